//! Fixed values with scales for blocks: round to nearest, NF4 and GPTQ, compared with bitsandbytes,
//! torchao and AutoGPTQ, and runs with them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::f16;
use sdxl_squeeze::Error;
use sdxl_squeeze::checkpoint::SafetensorsFile;
use sdxl_squeeze::codebook::{BitWidth, Grid, PaletteOptions, Quantizer, Scales};
use sdxl_squeeze::container::Container;
use sdxl_squeeze::solver::palette::{Palettized, palettize};
use sdxl_squeeze::solver::{Factor, GPTQ_DAMPENING, Hessian, InputGeometry, Windows, gptq, output_energy};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::matrices::{correlated, hessian, numbers};
use crate::squeeze::Squeeze;
use crate::support::{container, emoji, repo, report, tensors, tiny};

/// The block size of the golden values.
const BLOCK: usize = 64;

fn options(bits: BitWidth, grid: Grid, block_size: usize, feedback: bool) -> PaletteOptions {
    PaletteOptions { bits, quantizer: Some(Quantizer { grid, block_size, feedback }), ..PaletteOptions::default() }
}

fn golden() -> BTreeMap<String, Tensor> {
    tensors(&repo("tests/golden/quantized.safetensors"))
}

fn halves(tensor: &Tensor) -> Vec<f16> {
    Vec::try_from(tensor.to_kind(Kind::Half).flatten(0, -1)).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.to_kind(Kind::Float).flatten(0, -1)).unwrap()
}

fn scales(palettized: &Palettized) -> &Scales {
    palettized.codebook.scales.as_ref().unwrap()
}

/// The share of equal numbers.
fn agreement(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).filter(|(ours, theirs)| ours == theirs).count() as f64 / ours.len() as f64
}

/// The scales of others are fp32; rounded to fp16 they are ours. A code may differ only where two
/// values are as near, up to the rounding of scales and values to fp16.
#[test]
fn nearest_values_are_those_of_torchao_and_bitsandbytes() {
    let golden = golden();
    let weight = halves(&golden["nearest.weight"]);
    for (name, bits, grid) in
        [("int4", BitWidth::Four, Grid::Int), ("int8", BitWidth::Eight, Grid::Int), ("nf4", BitWidth::Four, Grid::Nf4)]
    {
        let ours = palettize("a", &weight, &[12, 256], None, &options(bits, grid, BLOCK, false)).unwrap();
        let theirs = &golden[&format!("nearest.{name}.scales")];
        assert_eq!((&scales(&ours).values, scales(&ours).block), (&halves(theirs), Some(BLOCK)), "{name}");
        let table: Vec<f32> = match grid {
            Grid::Int => (0..bits.entries()).map(|index| index as f32 - (bits.entries() / 2) as f32).collect(),
            Grid::Nf4 => floats(&golden["nearest.nf4.table"]),
        };
        let entries: Vec<f16> = table.iter().copied().map(f16::from_f32).collect();
        assert_eq!(ours.codebook.palettes, entries, "{name}");
        let first = if grid == Grid::Int { table[0] } else { 0.0 };
        let codes: Vec<f32> = ours.indices.iter().map(|index| f32::from(*index) + first).collect();
        let their_codes = floats(&golden[&format!("nearest.{name}.codes")]);
        let share = agreement(&codes, &their_codes);
        // A block's largest magnitude is 7.5 in torchao's int4, as near to 7 as to 8.
        assert!(share > if bits == BitWidth::Eight { 0.96 } else { 0.99 }, "{name}: {share}");
        let (decoded, their_scales) = (ours.decode(None).unwrap(), floats(theirs));
        for (at, code) in their_codes.iter().enumerate() {
            let scale = their_scales[at / BLOCK];
            let error = |value: f32| (value - weight[at].to_f32()).abs();
            let rounding = scale * table[table.len() - 1] * 1e-3;
            assert!(error(decoded[at].to_f32()) <= error(table[(code - first) as usize] * scale) + rounding, "{name} {at}");
        }
    }
}

fn rounded_with_feedback(weight: &Tensor, hessian: &Hessian, options: &PaletteOptions) -> Palettized {
    let factors = Factor::all(hessian, GPTQ_DAMPENING).unwrap();
    gptq("a", weight, hessian, &factors, options).unwrap().palettized
}

/// The loss of a weight [o, ...] against the original one.
fn loss(new: &[f32], weight: &Tensor, hessian: &Hessian) -> f64 {
    let new = Tensor::from_slice(new).reshape(weight.size());
    output_energy(&(new - weight.to_kind(Kind::Float)), hessian).unwrap() / output_energy(weight, hessian).unwrap()
}

fn decoded(palettized: &Palettized) -> Vec<f32> {
    palettized.decode(None).unwrap().iter().map(|value| value.to_f32()).collect()
}

#[test]
fn error_feedback_gives_the_codes_of_autogptq() {
    let golden = golden();
    for (name, kind) in [("linear", InputGeometry::Linear), ("conv", InputGeometry::Windows(Windows::new(1, 1)))] {
        let weight = &golden[&format!("{name}.weight")];
        let mut hessian = Hessian::for_weight(kind, &weight.size(), Device::Cpu).unwrap();
        hessian.add(&golden[&format!("{name}.input")]).unwrap();
        let ours = rounded_with_feedback(weight, &hessian, &options(BitWidth::Four, Grid::Int, BLOCK, true));
        let codes: Vec<f32> = ours.indices.iter().map(|index| f32::from(*index) - 8.0).collect();
        let part = |run: &str, part: &str| floats(&golden[&format!("{name}.{run}.{part}")]);
        let share = agreement(&codes, &part("stored", "codes"));
        // A largest magnitude is 7.5, and one code on the other side changes those after it.
        assert!(share > 0.97, "{name}: {share}");
        let columns = codes.len() / 24;
        let our_scales: Vec<f32> = scales(&ours).values.iter().map(|scale| scale.to_f32()).collect();
        let (their_codes, their_scales) = (part("stored", "codes"), part("stored", "scales"));
        let blocks = columns.div_ceil(BLOCK);
        let of_row = |row: usize| (row * columns..(row + 1) * columns, row * blocks..(row + 1) * blocks);
        let mut equal = 0;
        for (codes_of, scales_of) in (0..24).map(of_row) {
            if codes[codes_of.clone()] == their_codes[codes_of] {
                equal += 1;
                let pairs = our_scales[scales_of.clone()].iter().zip(&their_scales[scales_of]);
                let worst = pairs.map(|(ours, theirs)| (ours / theirs - 1.0).abs()).fold(0.0, f32::max);
                assert!(worst < 2e-3, "{name}: {worst}");
            }
        }
        assert!(equal > 12, "{name}: {equal} of 24 rows");

        // As published, with the scales in fp32, it is as good.
        let (their_codes, their_scales) = (part("published", "codes"), part("published", "scales"));
        let scale = |at: usize| their_scales[at / columns * columns.div_ceil(BLOCK) + at % columns / BLOCK];
        let theirs: Vec<f32> = their_codes.iter().enumerate().map(|(at, code)| code * scale(at)).collect();
        let (our_loss, their_loss) = (loss(&decoded(&ours), weight, &hessian), loss(&theirs, weight, &hessian));
        assert!((our_loss / their_loss - 1.0).abs() < 0.05, "{name}: {our_loss:.3e}, {their_loss:.3e}");
        let plain = options(BitWidth::Four, Grid::Int, BLOCK, false);
        let shape: Vec<usize> = weight.size().iter().map(|size| *size as usize).collect();
        let nearest = palettize("a", &halves(weight), &shape, None, &plain).unwrap();
        assert!(our_loss < 0.8 * loss(&decoded(&nearest), weight, &hessian), "{name}");
    }
}

/// The definition, in fp64, a column at a time: with the inverse of the damped Hessian of the
/// columns from j on, the columns after j move by -(w_j - q) Hinv_jk / Hinv_jj.
fn by_definition(weight: &[f64], h: &Tensor, block: usize, palettized: &Palettized) -> Vec<f64> {
    let d = h.size()[0] as usize;
    let entries: Vec<f64> = palettized.codebook.palettes.iter().map(|entry| entry.to_f64()).collect();
    let mut rows: Vec<Vec<f64>> = weight.chunks(d).map(<[f64]>::to_vec).collect();
    let most = entries.iter().fold(0.0, |most: f64, entry| entry.abs().max(most));
    // int4: 8 is in the table, 7.5 is what the largest magnitude becomes.
    let reach = if most == 8.0 { 7.5 } else { 1.0 };
    let mut levels = vec![Vec::new(); rows.len()];
    for column in 0..d {
        let rest = (d - column) as i64;
        let inverse = h.narrow(0, column as i64, rest).narrow(1, column as i64, rest).inverse();
        let inverse = Vec::<f64>::try_from(inverse.get(0)).unwrap();
        for (row, levels) in rows.iter_mut().zip(&mut levels) {
            if column % block == 0 {
                let largest = row[column..d.min(column + block)].iter().fold(0.0, |most: f64, value| value.abs().max(most));
                let scale = f16::from_f64(largest / reach).to_f64();
                *levels = entries.iter().map(|entry| f16::from_f64(entry * scale).to_f64()).collect::<Vec<f64>>();
            }
            let value = row[column];
            let level = *levels.iter().min_by(|a, b| (**a - value).abs().total_cmp(&(**b - value).abs())).unwrap();
            row[column] = level;
            for (ahead, factor) in row[column + 1..].iter_mut().zip(&inverse[1..]) {
                *ahead -= (value - level) * factor / inverse[0];
            }
        }
    }
    rows.concat()
}

/// Blocks that are longer than a panel, that no panel holds a whole number of, and whole rows.
#[test]
fn error_feedback_follows_the_definition_whatever_the_blocks() {
    let (rows, d) = (6, 150);
    let weight = numbers(&[rows, d], 5);
    let hessian = hessian(&correlated(700, d, 3, 4));
    let h = hessian.matrix().unwrap().squeeze_dim(0).to_kind(Kind::Double);
    let damped = &h + Tensor::eye(d, (Kind::Double, Device::Cpu)) * h.diagonal(0, 0, 1).mean(Kind::Double) * GPTQ_DAMPENING;
    let original: Vec<f64> = floats(&weight).into_iter().map(f64::from).collect();
    for grid in [Grid::Int, Grid::Nf4] {
        for block in [7, 50, 64, 128, 140, 149, 150, 1000] {
            let ours = rounded_with_feedback(&weight, &hessian, &options(BitWidth::Four, grid, block, true));
            assert_eq!(scales(&ours).block, (block < 150).then_some(block));
            let expected = by_definition(&original, &damped, block.min(150), &ours);
            let expected: Vec<f32> = expected.into_iter().map(|value| value as f32).collect();
            let ours = decoded(&ours);
            let share = agreement(&ours, &expected);
            // One code of a row that falls on the other side in fp32 changes the codes after it.
            assert!(share > 0.85, "{grid:?} {block}: {share}");
            let (our_loss, their_loss) = (loss(&ours, &weight, &hessian), loss(&expected, &weight, &hessian));
            assert!((our_loss / their_loss - 1.0).abs() < 0.02, "{grid:?} {block}: {our_loss:.3e}, {their_loss:.3e}");
        }
    }
}

#[test]
fn grouped_convolutions_and_any_number_of_threads() {
    let options = options(BitWidth::Four, Grid::Int, 16, true);
    let made = || (numbers(&[24, 4, 3, 3], 8), numbers(&[3, 12, 9, 9], 9));
    let whole = || {
        let (weight, inputs) = made();
        let geometry = Windows { stride: [1; 2], padding: [1; 2], dilation: [1; 2], groups: 3 };
        let mut hessian = Hessian::for_weight(InputGeometry::Windows(geometry), &weight.size(), Device::Cpu).unwrap();
        hessian.add(&inputs).unwrap();
        rounded_with_feedback(&weight, &hessian, &options)
    };
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    assert_eq!(pool(1).install(whole), pool(3).install(whole));
    let (whole, (weight, inputs)) = (whole(), made());
    // Each group is a convolution of its own.
    for group in 0..3 {
        let (weight, inputs) = (weight.narrow(0, group * 8, 8), inputs.narrow(1, group * 4, 4));
        let mut hessian = Hessian::for_weight(InputGeometry::Windows(Windows::new(1, 1)), &weight.size(), Device::Cpu).unwrap();
        hessian.add(&inputs).unwrap();
        let alone = decoded(&rounded_with_feedback(&weight, &hessian, &options));
        let of_group = &decoded(&whole)[group as usize * 288..(group as usize + 1) * 288];
        assert!(agreement(&alone, of_group) > 0.98);
    }
}

#[test]
fn what_gptq_cannot_do_is_refused() {
    let (weight, sums) = (numbers(&[4, 8], 1), hessian(&numbers(&[50, 8], 2)));
    let factors = Factor::all(&sums, GPTQ_DAMPENING).unwrap();
    let refused = |weight: &Tensor, factors: &[Factor], options: &PaletteOptions| {
        let error = gptq("a", weight, &sums, factors, options).unwrap_err();
        assert!(error.is_bad_input(), "{error}");
        error.to_string()
    };
    let int = options(BitWidth::Four, Grid::Int, 4, true);
    assert!(refused(&weight, &factors, &PaletteOptions::default()).contains("`a`: no fixed values are asked for"));
    assert!(refused(&weight, &factors, &PaletteOptions { bits: BitWidth::Three, ..int }).contains("4 or 8 bits, not 3"));
    assert!(refused(&weight, &[], &int).contains("the list of factors"));
    assert!(refused(&numbers(&[4, 9], 1), &factors, &int).contains("one for a Hessian of 8 inputs"));
    let nan = gptq("a", &(&weight * f64::NAN), &sums, &factors, &int).unwrap_err();
    assert!(matches!(nan, Error::NotFinite(_)), "{nan}");
    // A weight beyond fp16 becomes as large as fp16 allows.
    let huge = gptq("a", &(&weight * 1e6), &sums, &factors, &int).unwrap().palettized.decode(None).unwrap();
    assert!(huge.iter().all(|value| value.is_finite()) && huge.iter().any(|value| value.to_f32().abs() > 3e4));
}

/// The names of the rows that a table of equal bytes needs, and their settings.
const BASELINES: [(&str, &str); 4] = [
    ("rtn", "values: int"),
    ("nf4", "values: nf4"),
    ("gptq", "values: int, feedback: true"),
    ("gptq-nf4", "{values: nf4, feedback: true, block_size: 32}"),
];

fn config(folder: &Path, name: &str, settings: &str) -> PathBuf {
    let path = folder.join(format!("{name}.yaml"));
    let settings = settings.trim_matches(['{', '}']);
    std::fs::write(&path, format!("solver: sequential\npalettize: {{global_config: {{{settings}}}}}\n")).unwrap();
    path
}

#[test]
fn a_run_with_fixed_values_is_planned_stored_and_exported() {
    let folder = tempfile::tempdir().unwrap();
    let mut sizes = BTreeMap::new();
    for (name, settings) in BASELINES {
        let out = folder.path().join(name);
        let run = Squeeze::new("compress").with("--config", config(folder.path(), name, settings)).model(tiny()).out(&out);
        let run = if settings.contains("feedback") { run.samples(2, 2) } else { run };
        run.succeeds();
        let stored = out.join("unet.squeezed.safetensors");
        let found = Container::open(&stored).unwrap();
        assert_eq!(found.verify().unwrap().version, 2, "{name}");
        let report = report(&out);
        assert_eq!(report["plan"]["payload_bytes"], report["payload_bytes"], "{name}");
        sizes.insert(name, report["payload_bytes"].as_u64().unwrap());
        let block = if settings.contains("32") { 32 } else { 64 };
        let mut blocks = 0;
        for layer in found.layers() {
            let (rows, elements) = (layer.shape[0] as u64, layer.shape.iter().product::<i64>() as u64);
            let columns = elements / rows;
            // 4 bits an element, 16 values, and 2 bytes a block.
            assert_eq!(layer.bytes, elements / 2 + 32 + 2 * rows * columns.div_ceil(block), "{}", layer.name);
            assert_eq!(layer.scale_block, (columns > block).then_some(block as usize), "{}", layer.name);
            blocks += usize::from(layer.scale_block.is_some());
            let error = layer.report["weight"].as_f64().unwrap();
            assert!((0.0..0.5).contains(&error), "{}: {error}", layer.name);
        }
        assert!(blocks > 20, "{blocks}");

        let said = Squeeze::new("inspect").arg(&stored).succeeds().text();
        assert!(said.contains(&format!("4 b{block}")), "{said}");
        let layers: Vec<Value> = Squeeze::new("inspect").arg(&stored).arg("--json").succeeds().json();
        assert_eq!(layers.iter().filter(|layer| layer["scale_block"] == block).count(), blocks);

        let export = Squeeze::new("export").arg(&stored);
        let (package, buffers) = (out.join("unet.mlpackage"), out.join("buffers.safetensors"));
        let refusal = ["palettes have no scales for blocks of columns", "down_blocks", "--to diffusers"];
        export.clone().with("--to", "coreml").out(&package).is_refused(&refusal);
        export.clone().with("--to", "coremltools").out(&buffers).is_refused(&refusal);
        assert!(!package.exists() && !buffers.exists());
        let diffusers = out.join("diffusers");
        export.with("--to", "diffusers").model(tiny()).out(&diffusers).succeeds();
        let file = SafetensorsFile::open(&diffusers.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
        for layer in found.layers() {
            let bytes: Vec<u8> = found.decode(&layer.name).unwrap().iter().flat_map(|value| value.to_le_bytes()).collect();
            assert!(file.read(&layer.name).unwrap() == bytes, "{}", layer.name);
        }
    }
    assert_eq!((sizes["rtn"], sizes["rtn"]), (sizes["nf4"], sizes["gptq"]));
}

/// The shipped baselines on the bundled model: 4.25 bits a weight and the 16 values.
#[test]
fn baselines_on_the_bundled_model_have_the_bytes_of_4_and_a_quarter_bits() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = Vec::new();
    for name in ["rtn-int4-g64", "nf4-g64", "gptq-int4-g64"] {
        let out = folder.path().join(name);
        let run = Squeeze::new("compress").config(&format!("emoji/{name}")).model(emoji()).out(&out);
        let run = if name.starts_with("gptq") { run.samples(4, 4) } else { run };
        run.succeeds();
        let found = Container::open(&out.join("unet.squeezed.safetensors")).unwrap();
        let verification = found.verify().unwrap();
        bytes.push(verification.payload_bytes);
        let mut whole = 0;
        for layer in found.layers() {
            let elements = layer.shape.iter().product::<i64>() as f64;
            let columns = layer.shape[1..].iter().product::<i64>();
            if columns % 64 == 0 {
                assert!((layer.bits_per_weight - 4.25 - 256.0 / elements).abs() < 1e-9, "{}", layer.name);
                whole += 1;
            }
            let weight = found.weight(&layer.name).unwrap();
            assert_eq!(weight.decode().unwrap().len() as f64, elements);
            let (of_weight, of_output) = (layer.report["weight"].as_f64().unwrap(), layer.report["output"].as_f64());
            // GPTQ has the least error of the outputs, not of the weights.
            let error = if name.starts_with("gptq") { of_output.unwrap() } else { of_weight };
            assert!(error < 0.03, "{name}: {}: {error}", layer.name);
            assert_eq!(of_output.is_some(), name.starts_with("gptq"), "{name}: {}", layer.name);
        }
        assert!(whole > 200, "{whole}");
    }
    assert!(bytes.windows(2).all(|pair| pair[0] == pair[1]), "{bytes:?}");
}

/// A pruned weight keeps its mask.
#[test]
fn fixed_values_go_with_masks_and_equal_runs_are_equal() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("c.yaml");
    let yaml =
        "prune: {algorithm: magnitude, global_config: {target_sparsity: 0.5}}\npalettize: {global_config: {values: nf4}}\n";
    std::fs::write(&config, yaml).unwrap();
    let run = |name: &str| {
        let out = folder.path().join(name);
        Squeeze::new("compress").with("--config", &config).model(tiny()).out(&out).succeeds();
        (container(&out), out)
    };
    let (first, out) = run("a");
    assert!(first == run("b").0);
    let found = Container::open(&out.join("unet.squeezed.safetensors")).unwrap();
    let mut masked = 0;
    for layer in found.layers().filter(|layer| layer.sparsity > 0.0) {
        let weight = found.weight(&layer.name).unwrap();
        let dense = weight.decode().unwrap();
        let mask = weight.mask.as_ref().unwrap();
        assert!((0..dense.len()).all(|at| mask.get(at) || dense[at].to_bits() == 0), "{}", layer.name);
        masked += 1;
    }
    assert!(masked > 20, "{masked}");
}
