//! The container, compared with a reader and writer in Python, and tested with a whole UNet and
//! with hostile files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::f16;
use safetensors::{Dtype, SafeTensors};
use sdxl_squeeze::checkpoint::{self, SafetensorsFile, TensorSource, TensorSpec, Weights};
use sdxl_squeeze::codebook::{BitWidth, Codebook};
use sdxl_squeeze::container::{CompressedWeight, Container, ContainerInfo, ContainerWriter, Network, Packed, SourceFile};
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::model::unet::{Unet, UnetChain, UnetConfig};
use sdxl_squeeze::pipeline::{UnetWeights, verify};
use sdxl_squeeze::progress::Silent;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use crate::support::{emoji, repo};

const AS_STORED: Placement = Placement { device: Device::Cpu, kind: Kind::Half };

fn golden() -> PathBuf {
    repo("tests/golden/container/unet.squeezed.safetensors")
}

/// Of version 2, with vector palettes.
fn golden_vectors() -> PathBuf {
    repo("tests/golden/container/vectors.squeezed.safetensors")
}

fn golden_blocks() -> PathBuf {
    repo("tests/golden/container/blocks.squeezed.safetensors")
}

fn halves(bytes: &[u8]) -> Vec<f16> {
    bytes.chunks_exact(2).map(|pair| f16::from_le_bytes([pair[0], pair[1]])).collect()
}

fn bits(values: &[f16]) -> Vec<u16> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The bits of an fp16 tensor, which distinguish +0 from -0.
fn tensor_bits(tensor: &Tensor) -> Vec<u16> {
    bits(&Vec::<f16>::try_from(&tensor.f_view([-1]).unwrap()).unwrap())
}

/// Compares the weights and tensors of a container by Python with those that Python decoded.
fn decodes_to(container: &Container, decoded: &str) {
    let decoded = SafetensorsFile::open(&repo(decoded)).unwrap();
    let source = UnetWeights::from(container).source(AS_STORED);
    for (name, entry) in decoded.entries() {
        let ours = source.tensor(name, &entry.shape).unwrap();
        assert_eq!(tensor_bits(&ours), bits(&halves(&decoded.read(name).unwrap())), "{name}");
        assert!(source.tensor(name, &[entry.shape.as_slice(), &[1]].concat()).is_err());
    }
    assert!(source.tensor("other.weight", &[1]).unwrap_err().to_string().contains("other.weight"));
    assert_eq!(container.layers().len() + container.tensors().count(), decoded.entries().len());
}

#[test]
fn a_container_from_python_decodes_to_what_python_says() {
    let container = Container::open(&golden()).unwrap();
    decodes_to(&container, "tests/golden/container/decoded.safetensors");

    let verification = container.verify().unwrap();
    assert_eq!((verification.weights, verification.tensors, verification.version), (22, 2, 1));
    assert_eq!(verification.bytes, std::fs::metadata(golden()).unwrap().len());
    assert_eq!(verification.payload_bytes, verification.weight_bytes + verification.tensor_bytes);
    assert_eq!(verification.sources, container.info().sources);
    assert_eq!(container.info().recipe["note"], "Größe");
    let pruned = container.layers().find(|layer| layer.name == "pruned_4.weight").unwrap();
    assert_eq!(
        (pruned.bits, pruned.axis, pruned.group_size, pruned.report["error"].as_f64()),
        (Some(4), Some(0), Some(3), Some(0.25))
    );
    let weight = container.weight("pruned_4.weight").unwrap();
    assert_eq!((pruned.bytes, pruned.sparsity, pruned.kept), (weight.stored_bytes(), weight.sparsity(), weight.kept() as u64));
}

#[test]
fn vector_palettes_from_python_decode_to_what_python_says() {
    let container = Container::open(&golden_vectors()).unwrap();
    decodes_to(&container, "tests/golden/container/vectors-decoded.safetensors");
    let verification = container.verify().unwrap();
    assert_eq!((verification.weights, verification.tensors, verification.version), (17, 1, 2));
    let lengths: BTreeMap<String, Option<usize>> = container.layers().map(|layer| (layer.name, layer.vector_length)).collect();
    let length = |name: &str| lengths[name];
    assert_eq!([length("pruned_4.weight"), length("long.weight"), length("scalar.weight")], [Some(3), Some(16), Some(1)]);
    for layer in container.layers() {
        let weight = container.weight(&layer.name).unwrap();
        let zeros = weight.decode().unwrap().iter().filter(|value| **value == f16::ZERO).count();
        assert_eq!((weight.kept() as u64, weight.numel() - weight.kept()), (layer.kept, zeros), "{}", layer.name);
        assert_eq!((layer.bytes, layer.sparsity), (weight.stored_bytes(), weight.sparsity()));
    }
}

#[test]
fn scales_of_blocks_from_python_decode_to_what_python_says() {
    let container = Container::open(&golden_blocks()).unwrap();
    decodes_to(&container, "tests/golden/container/blocks-decoded.safetensors");
    let verification = container.verify().unwrap();
    assert_eq!((verification.weights, verification.tensors, verification.version), (16, 1, 2));
    let blocks: BTreeMap<String, Option<usize>> = container.layers().map(|layer| (layer.name, layer.scale_block)).collect();
    let block = |name: &str| blocks[name];
    assert_eq!([block("linear_4.weight"), block("conv.weight"), block("rows.weight")], [Some(8), Some(10), None]);
    for layer in container.layers() {
        let weight = container.weight(&layer.name).unwrap();
        assert!(layer.scaled && layer.bytes == weight.stored_bytes(), "{}", layer.name);
    }
}

/// MIL's own operations decode vectors, dense and masked, of every width.
#[test]
fn vector_palettes_decode_as_by_coremltools() {
    let file = SafetensorsFile::open(&repo("tests/golden/coreml/vectors.safetensors")).unwrap();
    let cases: Vec<&str> = file.entries().keys().filter_map(|name| name.strip_suffix(".dense")).collect();
    assert_eq!(cases.len(), 96);
    for case in cases {
        let read = |part: &str| file.read(&format!("{case}.{part}")).unwrap();
        let shape = file.entries()[&format!("{case}.dense")].shape.clone();
        let lut = file.entries()[&format!("{case}.lut")].shape.clone();
        let [entries, vector_length] = [lut.len() - 2, lut.len() - 1].map(|axis| lut[axis] as usize);
        let codebook = Codebook {
            bits: BitWidth::try_from(entries.ilog2() as u8).unwrap(),
            axis: 0,
            group_size: (shape[0] / lut[0]) as usize,
            vector_length,
            palettes: halves(&read("lut")),
            scales: None,
        };
        let masked = file.entries().contains_key(&format!("{case}.mask"));
        let keep: Option<Vec<bool>> = masked.then(|| read("mask").iter().map(|bit| *bit == 1).collect());
        let mut stored = read("indices").into_iter();
        // An index for each vector; those of pruned ones have no meaning.
        let indices: Vec<u8> = match &keep {
            None => stored.collect(),
            Some(keep) => keep.iter().map(|kept| if *kept { stored.next().unwrap() } else { 0 }).collect(),
        };
        let weight = CompressedWeight::palettized(shape, keep.as_deref(), codebook, &indices).unwrap();
        assert_eq!(bits(&weight.decode().unwrap()), bits(&halves(&read("dense"))), "{case}");
    }
}

#[test]
fn bits_are_packed_as_by_coremltools() {
    let cases: Value = serde_json::from_slice(&std::fs::read(repo("tests/golden/container/packing.json")).unwrap()).unwrap();
    for case in cases.as_array().unwrap() {
        let values: Vec<u8> = serde_json::from_value(case["values"].clone()).unwrap();
        let packed = Packed::pack(&values, BitWidth::try_from(case["bits"].as_u64().unwrap() as u8).unwrap()).unwrap();
        let hex: String = packed.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, case["packed"].as_str().unwrap(), "{case}");
    }
    assert_eq!(cases.as_array().unwrap().len(), 48);
}

/// Copies the container `from` to `to`. Weights and tensors are written in the order that they have
/// in the file `order`.
fn rewrite(from: &Path, order: &Path, to: &Path) {
    let container = Container::open(from).unwrap();
    let order = SafetensorsFile::open(order).unwrap();
    let mut names: Vec<_> = order.entries().iter().map(|(name, entry)| (entry.start(), name)).collect();
    names.sort();
    let reports: BTreeMap<String, Value> = container.layers().map(|layer| (layer.name, layer.report)).collect();
    let mut writer = ContainerWriter::create(to, container.info().clone()).unwrap();
    for (_, name) in names {
        match reports.get(name) {
            Some(report) => writer.add_weight(name, &container.weight(name).unwrap(), report.clone()).unwrap(),
            None => {
                let shape = &order.entries()[name].shape;
                writer.add_tensor(name, shape, &container.tensor(name).unwrap()).unwrap();
            }
        }
    }
    let written = writer.finish().unwrap();
    assert_eq!(written.bytes, std::fs::metadata(to).unwrap().len());
}

#[test]
fn the_same_container_is_the_same_bytes_as_from_python() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("again.safetensors");
    rewrite(&golden(), &repo("tests/golden/container/decoded.safetensors"), &path);
    assert!(std::fs::read(&path).unwrap() == std::fs::read(golden()).unwrap());
    rewrite(&golden_vectors(), &repo("tests/golden/container/vectors-decoded.safetensors"), &path);
    assert!(std::fs::read(&path).unwrap() == std::fs::read(golden_vectors()).unwrap());
}

/// Rounds a weight to 2^bits evenly spaced levels and prunes its smallest elements. This is fast,
/// and sufficient for tests of the format.
fn crush(weight: &Tensor, bits: BitWidth, group_size: usize, sparsity: Option<f64>) -> CompressedWeight {
    let shape = weight.size();
    let values = Vec::<f16>::try_from(&weight.to_kind(Kind::Half).view([-1])).unwrap();
    let levels = bits.entries();
    let row = values.len() / shape[0] as usize;
    let (mut palettes, mut indices) = (Vec::new(), Vec::new());
    for group in values.chunks(row * group_size) {
        let top = group.iter().fold(0f32, |top, value| top.max(value.to_f32().abs()));
        let step = 2.0 * top / (levels - 1).max(1) as f32;
        palettes.extend((0..levels).map(|level| f16::from_f32(level as f32 * step - top)));
        indices.extend(
            group.iter().map(|value| ((value.to_f32() + top) / step.max(1e-9)).round().clamp(0.0, levels as f32 - 1.0) as u8),
        );
    }
    let keep: Option<Vec<bool>> = sparsity.map(|sparsity| {
        let mut sizes: Vec<f32> = values.iter().map(|value| value.to_f32().abs()).collect();
        sizes.sort_by(f32::total_cmp);
        let threshold = sizes[(sparsity * sizes.len() as f64) as usize];
        values.iter().map(|value| value.to_f32().abs() >= threshold).collect()
    });
    let codebook = Codebook { bits, axis: 0, group_size, vector_length: 1, palettes, scales: None };
    CompressedWeight::palettized(shape, keep.as_deref(), codebook, &indices).unwrap()
}

/// Compresses the bundled UNet. Returns its architecture and the weights that the container must
/// decode to.
fn squeeze_emoji(path: &Path) -> (UnetChain, BTreeMap<String, Vec<f16>>) {
    let folder = emoji().join("unet");
    let chain = UnetChain::new(UnetConfig::read(&folder.join("config.json")).unwrap());
    let weights = Weights::open(&folder, "diffusion_pytorch_model", str::to_owned).unwrap();
    let source = weights.source(Placement::CPU);
    let mut writer = ContainerWriter::create(path, emoji_info()).unwrap();
    let mut dense = BTreeMap::new();
    for TensorSpec { name, shape } in chain.tensors().unwrap() {
        let tensor = source.tensor(&name, &shape).unwrap();
        let values = if shape.len() > 1 && tensor.numel() > 2048 && shape[0] % 16 == 0 {
            let weight = match name.len() % 3 {
                0 => crush(&tensor, BitWidth::Four, 16, Some(0.4)),
                1 => crush(&tensor, BitWidth::Six, shape[0] as usize, None),
                _ => {
                    let values = Vec::<f16>::try_from(&tensor.to_kind(Kind::Half).view([-1])).unwrap();
                    let keep: Vec<bool> = values.iter().map(|value| value.to_f32() > 0.0).collect();
                    CompressedWeight::sparse(shape.clone(), &keep, &values).unwrap()
                }
            };
            writer.add_weight(&name, &weight, json!({ "error": 0.5 })).unwrap();
            weight.decode().unwrap()
        } else {
            writer.add_tensor(&name, &shape, &checkpoint::halves(&tensor).unwrap()).unwrap();
            Vec::<f16>::try_from(&tensor.to_kind(Kind::Half).view([-1])).unwrap()
        };
        dense.insert(name, values);
    }
    let written = writer.finish().unwrap();
    // Names, shapes and hashes take little space even in this model, whose layers are small.
    assert!(written.bytes - written.payload_bytes < 320 * dense.len() as u64);
    (chain, dense)
}

fn emoji_info() -> ContainerInfo {
    let folder = emoji().join("unet");
    let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let weights = "diffusion_pytorch_model.safetensors";
    ContainerInfo {
        network: Network::Unet,
        config: config.as_object().unwrap().clone(),
        recipe: json!({ "palettize": { "n_bits": 4, "sparsity": 0.4 } }),
        sources: vec![SourceFile::read(&folder.join(weights), format!("unet/{weights}")).unwrap()],
        prediction_type: Some("epsilon".to_owned()),
    }
}

#[test]
fn a_unet_comes_back_from_its_container() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("unet.squeezed.safetensors");
    let (chain, dense) = squeeze_emoji(&path);
    let verification = verify(&path).unwrap();
    assert_eq!(verification.sources[0].bytes, 16_816_880);
    assert_eq!(verification.weight_elements + verification.tensor_elements, 8_371_780);
    assert!(verification.sparsity > 0.2 && verification.bits_per_weight < 10.0);

    let container = Container::open(&path).unwrap();
    let source = UnetWeights::from(&container).source(AS_STORED);
    for TensorSpec { name, shape } in chain.tensors().unwrap() {
        assert_eq!(tensor_bits(&source.tensor(&name, &shape).unwrap()), bits(&dense[&name]), "{name}");
    }
    let weights = UnetWeights::from(&container);
    Unet::resident(weights.chain().unwrap(), weights.source(Placement::CPU), &Silent).unwrap();

    // A run on one thread gives the same bytes, and no temporary file is left beside the
    // containers.
    let again = folder.path().join("again.safetensors");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| squeeze_emoji(&again));
    assert!(std::fs::read(&again).unwrap() == std::fs::read(&path).unwrap());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);

    // `make_container.py compare` reads these two files.
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::copy(&path, kept.join("unet.squeezed.safetensors")).unwrap();
    let decoded: Vec<_> = chain
        .tensors()
        .unwrap()
        .into_iter()
        .map(|spec| (spec.name.clone(), source.tensor(&spec.name, &spec.shape).unwrap()))
        .collect();
    Tensor::write_safetensors(&decoded, kept.join("decoded.safetensors")).unwrap();
}

#[test]
fn a_container_of_another_architecture_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("some.safetensors");
    let mut writer = ContainerWriter::create(&path, emoji_info()).unwrap();
    writer.add_tensor("conv_in.bias", &[7], &[f16::ONE; 7]).unwrap();
    writer.add_tensor("surplus", &[7], &[f16::ONE; 7]).unwrap();
    writer.finish().unwrap();
    let error = verify(&path).unwrap_err();
    let message = error.to_string();
    for part in ["some.safetensors", "missing", "conv_in.bias is [7], not [32]", "surplus"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(error.is_bad_input());
}

#[test]
fn what_cannot_be_written_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let mut writer = ContainerWriter::create(&path, emoji_info()).unwrap();
    let weight = CompressedWeight::sparse(vec![1, 2], &[true, false], &[f16::ONE; 2]).unwrap();
    writer.add_weight("a.weight", &weight, Value::Null).unwrap();
    assert!(writer.add_weight("a.weight", &weight, Value::Null).is_err());
    assert!(writer.add_tensor("a.weight", &[1], &[f16::ONE]).is_err());
    assert!(writer.add_tensor("a.weight.mask", &[1], &[f16::ONE]).is_err());
    assert!(writer.add_tensor("b", &[2], &[f16::ONE]).is_err());
    assert!(writer.add_tensor("b", &[0], &[]).is_err());
    assert!(writer.add_tensor("b", &[1], &[f16::NAN]).is_err());
    assert!(writer.add_tensor("b", &[1], &checkpoint::halves(&Tensor::from_slice(&[70_000f32])).unwrap()).is_err());
    assert!(writer.add_tensor("__metadata__", &[1], &[f16::ONE]).is_err());
    let dense = CompressedWeight { mask: None, ..weight.clone() };
    assert!(writer.add_weight("c.weight", &dense, Value::Null).unwrap_err().to_string().contains("c.weight"));
    writer.add_tensor("a.weight.scales", &[1], &[f16::ONE]).unwrap();
    assert!(writer.finish().unwrap_err().to_string().contains("a.weight.scales"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    assert!(ContainerWriter::create(&folder.path().join("no/such/x.safetensors"), emoji_info()).is_err());
}

/// The parts of a container, from which a container with faults can be built.
#[derive(Clone)]
struct Raw {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Raw {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let names = header.offset_keys();
        let tensors = names.into_iter().map(|name| {
            let view = file.tensor(&name).unwrap();
            (name, view.dtype(), view.shape().to_vec(), view.data().to_vec())
        });
        Raw { metadata: header.metadata().clone().unwrap().into_iter().collect(), tensors: tensors.collect() }
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Dtype, Vec<usize>, Vec<u8>) {
        self.tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap()
    }

    fn bytes(&mut self, name: &str) -> &mut Vec<u8> {
        &mut self.tensor(name).3
    }

    fn drop(&mut self, name: &str) {
        let before = self.tensors.len();
        self.tensors.retain(|tensor| tensor.0 != name);
        assert_eq!(self.tensors.len() + 1, before);
    }

    fn row(&mut self, name: &str, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
        let mut rows: Value = serde_json::from_str(&self.metadata["weights"]).unwrap();
        change(rows[name].as_object_mut().unwrap());
        self.metadata.insert("weights".into(), rows.to_string());
    }

    /// Corrects the hashes of the data, the table and the metadata, so that faults must be found by
    /// other checks.
    fn seal(mut self) -> Self {
        let hash = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let data: Vec<u8> = self.tensors.iter().flat_map(|tensor| tensor.3.clone()).collect();
        // Tensors at the same place are sorted by name. At most one tensor without data lies
        // between two others here, so the table has the order of the file.
        let table: String = self.tensors.iter().map(|(name, dtype, shape, _)| format!("{name}={dtype} {shape:?}\n")).collect();
        self.metadata.insert("data_sha256".into(), hash(&data));
        self.metadata.insert("tensors_sha256".into(), hash(table.as_bytes()));
        self.metadata.remove("metadata_sha256");
        let lines: String = self.metadata.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
        self.metadata.insert("metadata_sha256".into(), hash(lines.as_bytes()));
        self
    }

    fn write(&self, path: &Path) {
        let mut header = serde_json::Map::from_iter([("__metadata__".to_owned(), json!(self.metadata))]);
        let mut data = Vec::new();
        for (name, dtype, shape, bytes) in &self.tensors {
            let start = data.len();
            data.extend(bytes);
            header
                .insert(name.clone(), json!({ "dtype": dtype.to_string(), "shape": shape, "data_offsets": [start, data.len()] }));
        }
        let header = Value::Object(header).to_string();
        std::fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()).unwrap();
    }
}

#[test]
fn lies_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lies.safetensors");
    let good = Raw::read(&golden());
    good.clone().seal().write(&path);
    Container::open(&path).unwrap().verify().unwrap();

    let (pruned, scaled, sparse) = ("pruned_4.weight", "scaled.weight", "sparse.weight");
    type Lie<'a> = (&'a str, Box<dyn Fn(&mut Raw) + 'a>);
    let part = |weight: &str, part: &str| format!("{weight}.{part}");
    let set = |name: &'static str, key: &'static str, value: Value| {
        Box::new(move |raw: &mut Raw| raw.row(name, |row| drop(row.insert(key.into(), value.clone())))) as Box<dyn Fn(&mut Raw)>
    };
    let entry = |key: &'static str, value: &'static str| {
        Box::new(move |raw: &mut Raw| drop(raw.metadata.insert(key.into(), value.into()))) as Box<dyn Fn(&mut Raw)>
    };
    let resize = |name: String, by: isize| {
        Box::new(move |raw: &mut Raw| {
            let tensor = raw.tensor(&name);
            tensor.3.resize(tensor.3.len().strict_add_signed(by), 0);
            tensor.2[0] = tensor.3.len();
        }) as Box<dyn Fn(&mut Raw)>
    };
    let mut lies: Vec<Lie> = vec![
        ("version `2`", entry("version", "2")),
        ("version `3`", entry("version", "3")),
        ("version `0`", entry("version", "0")),
        ("version `02`", entry("version", "02")),
        ("`pruned_4.weight` has a `vector_length`, which version 1 does not know", set(pruned, "vector_length", json!(3))),
        ("`pruned_4.weight` has a `vector_length`, which version 1 does not know", set(pruned, "vector_length", json!(1))),
        ("not a container", entry("format", "pt")),
        ("`weights`", entry("weights", "[1]")),
        ("`unet_config`", entry("unet_config", "7")),
        ("`sources`", entry("sources", "{")),
        ("`recipe`", entry("recipe", "")),
        ("unknown field `vector_dim`", set(pruned, "vector_dim", json!(2))),
        ("`pruned_4.weight` 5 bits are not supported", set(pruned, "bits", json!(5))),
        ("`pruned_4.weight` axis 2", set(pruned, "axis", json!(2))),
        ("`pruned_4.weight` groups of 4 do not divide the 6 channels", set(pruned, "group_size", json!(4))),
        ("`pruned_4.weight` groups of 0", set(pruned, "group_size", json!(0))),
        ("`pruned_4.weight.palettes` is F16 [2, 16]", set(pruned, "group_size", json!(2))),
        ("`pruned_4.weight.mask` is U8 [9]", set(pruned, "shape", json!([6, 20]))),
        ("is not the shape of a weight", set(pruned, "shape", json!([1i64 << 40, 1i64 << 40]))),
        ("is not the shape of a weight", set(pruned, "shape", json!([-6, -11]))),
        ("is not the shape of a weight", set(pruned, "shape", json!([]))),
        ("is not the shape of a weight", set(pruned, "shape", json!([i64::MAX, 1]))),
        ("elements are said to be kept of 66", set(pruned, "kept", json!(67))),
        ("elements are said to be kept of 66", set(pruned, "kept", json!(u64::MAX))),
        ("`pruned_4.weight.indices` is U8", set(pruned, "kept", json!(2))),
        ("must have all of bits, axis and group_size", set(pruned, "bits", Value::Null)),
        ("`pruned_4.weight.scales` is missing", set(pruned, "scaled", json!(true))),
        ("`scaled.weight.scales` does not belong", set(scaled, "scaled", json!(false))),
        ("`scaled.weight.mask` is missing", set(scaled, "masked", json!(true))),
        ("`sparse.weight` has scales but no palettes", set(sparse, "scaled", json!(true))),
        ("is not the weight that was written", set(pruned, "sha256", json!("0".repeat(64)))),
    ];
    for key in ["version", "unet_config", "recipe", "sources", "weights"] {
        lies.push((key, Box::new(move |raw| drop(raw.metadata.remove(key)))));
    }
    for (weight, kind, word) in [
        (pruned, "mask", "mask"),
        (pruned, "indices", "indices"),
        (pruned, "palettes", "palettes"),
        (scaled, "scales", "scales"),
        (sparse, "values", "values"),
    ] {
        let name = part(weight, kind);
        lies.push((
            "is missing",
            Box::new({
                let name = name.clone();
                move |raw| raw.drop(&name)
            }),
        ));
        if matches!(kind, "mask" | "indices") {
            lies.push((word, resize(name.clone(), 1)));
            lies.push((word, resize(name.clone(), -1)));
            // The mask has 66 bits, so 6 bits of its last byte are unused.
            if kind == "mask" {
                lies.push(("bits set after its last number", Box::new(move |raw| *raw.bytes(&name).last_mut().unwrap() |= 0x80)));
            }
        } else {
            // The two bytes are an fp16 NaN.
            lies.push(("NaN or infinite", Box::new(move |raw| raw.bytes(&name)[..2].copy_from_slice(&[0x01, 0x7e]))));
        }
    }
    let lone = |name: &'static str, dtype: Dtype, bytes: usize| {
        Box::new(move |raw: &mut Raw| raw.tensors.push((name.into(), dtype, vec![bytes / 2], vec![0; bytes])))
            as Box<dyn Fn(&mut Raw)>
    };
    lies.extend([
        ("the mask keeps", Box::new(|raw: &mut Raw| raw.bytes("pruned_4.weight.mask")[0] ^= 1) as Box<dyn Fn(&mut Raw)>),
        ("`norm.weight` has NaN", Box::new(|raw: &mut Raw| raw.bytes("norm.weight")[1] = 0x7e)),
        ("is not the weight that was written", Box::new(|raw: &mut Raw| raw.bytes("linear_4.weight.indices")[0] ^= 1)),
        ("is BF16", Box::new(|raw: &mut Raw| raw.tensor("norm.weight").1 = Dtype::BF16)),
        ("`pruned_4.weight.palettes` is BF16", Box::new(|raw: &mut Raw| raw.tensor("pruned_4.weight.palettes").1 = Dtype::BF16)),
        ("`odd` is I16", lone("odd", Dtype::I16, 4)),
        ("`sparse.weight.indices` does not belong", lone("sparse.weight.indices", Dtype::F16, 4)),
        ("`sparse.weight` does not belong", lone("sparse.weight", Dtype::F16, 4)),
        ("`none` is of shape", lone("none", Dtype::F16, 0)),
    ]);
    for (expected, lie) in &lies {
        let mut raw = good.clone();
        lie(&mut raw);
        raw.seal().write(&path);
        let error = Container::open_unverified(&path).and_then(|container| container.verify()).expect_err(expected);
        let message = error.to_string();
        assert!(message.contains(expected) && message.contains("lies.safetensors"), "{expected}: {message}");
        assert!(error.is_bad_input(), "{message}");
        // Decoding without verification may succeed, but must not panic.
        if let Ok(container) = Container::open_unverified(&path) {
            container.layers().for_each(|layer| drop(container.decode(&layer.name)));
        }
    }

    // In these files only a hash is wrong.
    for (expected, key) in [("metadata is damaged", "metadata_sha256"), ("lacks `metadata_sha256`", "")] {
        let mut raw = good.clone();
        raw.metadata.remove("metadata_sha256");
        if !key.is_empty() {
            raw.metadata.insert(key.into(), "0".repeat(64));
        }
        raw.write(&path);
        assert!(Container::open(&path).unwrap_err().to_string().contains(expected));
    }
    let mut raw = good.clone();
    raw.tensor("norm.weight").0 = "worm.weight".into();
    raw.write(&path);
    assert!(Container::open(&path).unwrap_err().to_string().contains("table of tensors is damaged"));
    // The changed entry of the palette is one that no index uses.
    let mut raw = good.clone();
    raw.bytes("empty.weight.palettes")[0] ^= 1;
    raw.write(&path);
    let container = Container::open_unverified(&path).unwrap();
    assert!(container.decode("empty.weight").is_ok());
    assert!(container.verify().unwrap_err().to_string().contains("the data is damaged"));
    assert!(Container::open(&path).unwrap_err().to_string().contains("the data is damaged"));
    // Opening the file names a damaged weight, as `verify` does.
    let mut raw = good.clone();
    raw.bytes("linear_4.weight.indices")[0] ^= 1;
    raw.write(&path);
    let said = Container::open(&path).unwrap_err().to_string();
    assert!(said.contains("`linear_4.weight` is not the weight that was written"), "{said}");
}

#[test]
fn lies_about_vectors_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lies.safetensors");
    let good = Raw::read(&golden_vectors());
    good.clone().seal().write(&path);
    Container::open(&path).unwrap().verify().unwrap();
    // [12, 11], vectors of 3, one group, 4 bits.
    let pruned = "pruned_4.weight";
    type Lie = (&'static str, Box<dyn Fn(&mut Raw)>);
    let set = |name: &'static str, key: &'static str, value: Value| {
        Box::new(move |raw: &mut Raw| raw.row(name, |row| drop(row.insert(key.into(), value.clone())))) as Box<dyn Fn(&mut Raw)>
    };
    let lies: Vec<Lie> = vec![
        ("vectors of 0 values", set(pruned, "vector_length", json!(0))),
        ("vectors of 17 values", set(pruned, "vector_length", json!(17))),
        ("vectors of 18446744073709551615 values", set(pruned, "vector_length", json!(u64::MAX))),
        ("invalid value", set(pruned, "vector_length", json!(-2))),
        ("vectors of 5 do not divide groups of 12", set(pruned, "vector_length", json!(5))),
        ("87 elements are said to be kept, which are no vectors of 2", set(pruned, "vector_length", json!(2))),
        ("no vectors of 3", set(pruned, "kept", json!(1))),
        ("vectors lie along axis 0, but the groups along axis 1", set(pruned, "axis", json!(1))),
        ("vectors of 3 cannot have scales", set(pruned, "scaled", json!(true))),
        ("vectors of 3 do not divide groups of 4", set(pruned, "group_size", json!(4))),
        ("groups of 9 do not divide the 12 channels", set(pruned, "group_size", json!(9))),
        ("`pruned_4.weight.palettes` is F16 [1, 16, 3], but must be F16 [2, 16, 3]", set(pruned, "group_size", json!(6))),
        ("27 elements are said to be kept, which are no vectors of 2", set("scalar.weight", "vector_length", json!(2))),
        (
            "`linear_4.weight.palettes` is F16 [2, 16, 2], but must be F16 [2, 16]",
            set("linear_4.weight", "vector_length", Value::Null),
        ),
        (
            "has vectors but no palettes",
            Box::new(|raw| {
                raw.row("linear_4.weight", |row| ["bits", "axis", "group_size"].iter().for_each(|key| drop(row.remove(*key))))
            }),
        ),
        (
            "`conv.weight` has a `vector_length`, which version 1 does not know",
            Box::new(|raw| drop(raw.metadata.insert("version".into(), "1".into()))),
        ),
        ("the mask keeps", Box::new(|raw| raw.bytes("pruned_4.weight.mask")[0] ^= 1)),
        ("bits set after its last number", Box::new(|raw| *raw.bytes("pruned_4.weight.mask").last_mut().unwrap() |= 0x80)),
        ("NaN or infinite", Box::new(|raw| raw.bytes("linear_4.weight.palettes")[..2].copy_from_slice(&[0x01, 0x7e]))),
        ("is not the weight that was written", Box::new(|raw| raw.bytes("linear_4.weight.indices")[0] ^= 1)),
        ("`linear_4.weight.indices` is missing", Box::new(|raw| raw.drop("linear_4.weight.indices"))),
    ];
    for (expected, lie) in &lies {
        let mut raw = good.clone();
        lie(&mut raw);
        raw.seal().write(&path);
        let error = Container::open_unverified(&path).and_then(|container| container.verify()).expect_err(expected);
        let message = error.to_string();
        assert!(message.contains(expected) && message.contains("lies.safetensors"), "{expected}: {message}");
        assert!(error.is_bad_input(), "{message}");
        if let Ok(container) = Container::open_unverified(&path) {
            container.layers().for_each(|layer| drop(container.decode(&layer.name)));
        }
    }
    // A weight of a container of version 2 may say that its palettes are scalar.
    let mut raw = good.clone();
    raw.row("scalar.weight", |row| drop(row.insert("vector_length".into(), json!(1))));
    raw.seal().write(&path);
    Container::open(&path).unwrap().verify().unwrap();
}

#[test]
fn lies_about_blocks_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lies.safetensors");
    let good = Raw::read(&golden_blocks());
    good.clone().seal().write(&path);
    Container::open(&path).unwrap().verify().unwrap();
    // [4, 24] in blocks of 8, and [3, 5] with a scale for each row.
    let (linear, rows) = ("linear_4.weight", "rows.weight");
    type Lie = (&'static str, Box<dyn Fn(&mut Raw)>);
    let set = |name: &'static str, key: &'static str, value: Value| {
        Box::new(move |raw: &mut Raw| raw.row(name, |row| drop(row.insert(key.into(), value.clone())))) as Box<dyn Fn(&mut Raw)>
    };
    let only_palettes = |raw: &mut Raw| {
        raw.drop("linear_4.weight.scales");
        raw.row("linear_4.weight", |row| drop(row.remove("scaled")));
    };
    let lies: Vec<Lie> = vec![
        ("blocks of 0 columns do not cut rows of 24", set(linear, "scale_block", json!(0))),
        ("blocks of 24 columns do not cut rows of 24", set(linear, "scale_block", json!(24))),
        ("blocks of 18446744073709551615 columns", set(linear, "scale_block", json!(u64::MAX))),
        ("invalid value", set(linear, "scale_block", json!(-2))),
        ("`linear_4.weight.scales` is F16 [4, 3], but must be F16 [4, 4]", set(linear, "scale_block", json!(7))),
        ("`linear_4.weight.scales` is F16 [4, 3], but must be F16 [4]", set(linear, "scale_block", Value::Null)),
        ("`rows.weight.scales` is F16 [3], but must be F16 [3, 2]", set(rows, "scale_block", json!(3))),
        ("`linear_4.weight` has a `scale_block` but no scales", Box::new(only_palettes)),
        ("`linear_4.weight.scales` is missing", Box::new(|raw| raw.drop("linear_4.weight.scales"))),
        ("vectors of 2 cannot have scales", set(linear, "vector_length", json!(2))),
        (
            "has a `scale_block`, which version 1 does not know",
            Box::new(|raw| drop(raw.metadata.insert("version".into(), "1".into()))),
        ),
        ("NaN or infinite", Box::new(|raw| raw.bytes("linear_4.weight.scales")[..2].copy_from_slice(&[0x01, 0x7e]))),
        ("is not the weight that was written", Box::new(|raw| raw.bytes("linear_4.weight.scales")[1] ^= 0x80)),
    ];
    for (expected, lie) in &lies {
        let mut raw = good.clone();
        lie(&mut raw);
        raw.seal().write(&path);
        let error = Container::open_unverified(&path).and_then(|container| container.verify()).expect_err(expected);
        let message = error.to_string();
        assert!(message.contains(expected) && message.contains("lies.safetensors"), "{expected}: {message}");
        assert!(error.is_bad_input(), "{message}");
        if let Ok(container) = Container::open_unverified(&path) {
            container.layers().for_each(|layer| drop(container.decode(&layer.name)));
        }
    }
}

#[test]
fn damage_anywhere_is_found() {
    damage_is_found(&golden());
}

#[test]
fn damage_anywhere_in_a_container_of_version_2_is_found() {
    damage_is_found(&golden_vectors());
    damage_is_found(&golden_blocks());
}

fn damage_is_found(golden: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.safetensors");
    let good = std::fs::read(golden).unwrap();
    let refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let verified = Container::open_unverified(&path).and_then(|container| container.verify());
        // Opening finds the same damage as verifying.
        assert_eq!(Container::open(&path).is_err(), verified.is_err());
        verified.is_err()
    };
    assert!(!refused(&good));
    for at in 0..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        assert!(refused(&bytes), "byte {at}");
    }
    for length in (0..good.len()).filter(|length| *length < 64 || *length % 37 == 0 || length + 64 > good.len()) {
        assert!(refused(&good[..length]), "cut to {length}");
    }
    assert!(refused(&[&good[..], &[0]].concat()));
    assert!(refused(&[&u64::MAX.to_le_bytes(), &good[8..]].concat()));
}
