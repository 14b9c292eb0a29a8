//! Exports of dense weights with the buffers that coremltools reads.

use half::f16;
use sdxl_squeeze::checkpoint::SafetensorsFile;
use sdxl_squeeze::container::Container;
use sdxl_squeeze::export::{SmallWeights, coremltools};
use sdxl_squeeze::progress::Silent;

use super::made_up;
use crate::squeeze::Squeeze;
use crate::support::repo;

fn halves(file: &SafetensorsFile, name: &str) -> Vec<f16> {
    file.read(name).unwrap().chunks_exact(2).map(|pair| f16::from_le_bytes([pair[0], pair[1]])).collect()
}

/// Whether coremltools takes a value for pruned.
fn dropped(value: f16) -> bool {
    value.to_f32().abs() <= 2f32.powi(-10)
}

#[test]
fn coremltools_would_find_mask_and_palettes_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.safetensors");
    made_up::container(&repo("tests/golden/base-like"), &path);
    let out = folder.path().join("out.safetensors");
    let refused = coremltools((&Container::open(&path).unwrap()).into(), &out, SmallWeights::Move, &Silent).unwrap_err();
    let words = "cannot convert weights that are pruned and have vector palettes";
    assert!(refused.is_bad_input() && refused.to_string().contains(words) && !out.exists(), "{refused}");

    made_up::container_without_masked_vectors(&repo("tests/golden/base-like"), &path);
    let container = Container::open(&path).unwrap();

    let refused = coremltools((&container).into(), &out, SmallWeights::Refuse, &Silent).unwrap_err();
    assert!(refused.is_bad_input() && refused.to_string().contains("2^-10") && !out.exists(), "{refused}");

    let moved = coremltools((&container).into(), &out, SmallWeights::Move, &Silent).unwrap();
    assert!(moved.iter().any(|row| refused.to_string().contains(&format!("{} ({})", row.name, row.elements))));
    let file = SafetensorsFile::open(&out).unwrap();
    assert_eq!(file.read("_COREML_/metadata_version").unwrap(), 1i64.to_le_bytes());
    let (mut buffers, mut vectors) = (1, 0);
    for layer in container.layers() {
        let (weight, was) = (container.weight(&layer.name).unwrap(), container.decode(&layer.name).unwrap());
        let is = halves(&file, &layer.name);
        let module = layer.name.trim_end_matches(".weight");
        let types = file.read(&format!("{module}._COREML_/weight/compression_type")).unwrap();
        let types: Vec<u8> = types.chunks(8).map(|number| number[0]).collect();
        let expected: &[u8] = match (&weight.mask, layer.bits) {
            (None, _) => &[2],
            (Some(_), None) => &[1],
            (Some(_), Some(_)) => &[1, 2],
        };
        assert_eq!(types, expected, "{}", layer.name);
        let mut changed = 0;
        for (i, (was, is)) in was.iter().zip(&is).enumerate() {
            let kept = weight.mask.as_ref().is_none_or(|mask| mask.get(i));
            // coremltools takes kept zeros for pruned, which does not change the weight.
            if weight.mask.is_some() && *was != f16::ZERO {
                assert_eq!(kept, !dropped(*is), "{} {i}", layer.name);
            }
            assert!(was == is || (weight.mask.is_some() && dropped(*was) && is.to_f32().abs() < 0.000_978), "{} {i}", layer.name);
            changed += u64::from(was != is);
        }
        assert_eq!(moved.iter().find(|row| row.name == layer.name).map_or(0, |row| row.elements), changed, "{}", layer.name);
        buffers += 1;
        let Some(bits) = layer.bits else { continue };
        buffers += 1;
        let name = format!("{module}._COREML_/weight/lut");
        let (shape, lut) = (file.entries()[&name].shape.clone(), halves(&file, &name));
        let rank = layer.shape.len();
        let length = weight.vector_length();
        assert_eq!((shape.len(), &shape[rank..]), (rank + 2, &[1 << bits, length as i64][..]), "{}", layer.name);
        let axis = format!("{module}._COREML_/weight/vector_axis");
        assert_eq!(file.entries().contains_key(&axis), length > 1, "{}", layer.name);
        if length > 1 {
            assert_eq!((file.read(&axis).unwrap(), file.entries()[&axis].shape.len()), (vec![0; 8], 0));
            buffers += 1;
            vectors += 1;
            // The values of neighbouring output channels are an entry of their block's palette.
            let columns = is.len() / layer.shape[0] as usize;
            let group = layer.shape[0] as usize / shape[0] as usize;
            for (row, column) in (0..layer.shape[0] as usize).step_by(length).flat_map(|row| (0..columns).map(move |c| (row, c)))
            {
                let vector: Vec<f16> = (row..row + length).map(|row| is[row * columns + column]).collect();
                let palette = &lut[(row / group * length) << bits..][..length << bits];
                assert!(palette.chunks(length).any(|entry| entry == vector), "{} {row} {column}", layer.name);
            }
            continue;
        }
        // Every kept weight is an entry of its block's palette.
        let inner: i64 = layer.shape[2..].iter().product();
        for (i, value) in is.iter().enumerate().filter(|(_, value)| **value != f16::ZERO) {
            let (row, column) = (i as i64 / inner / layer.shape[1], i as i64 / inner % layer.shape[1]);
            let block = row / (layer.shape[0] / shape[0]) * shape[1] + column / (layer.shape[1] / shape[1]);
            let palette = &lut[(block as usize) << bits..(block as usize + 1) << bits];
            assert!(palette.contains(value), "{} {i}", layer.name);
        }
    }
    let tensors = container.layers().len() + container.tensors().count();
    assert_eq!(file.entries().len(), tensors + buffers);
    assert!(vectors > 20, "{vectors}");
    // `check_coremltools.py` has coremltools find the palettes again.
    std::fs::copy(&out, std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("coremltools.safetensors")).unwrap();
}

#[test]
fn the_command_says_what_it_moved() {
    let folder = tempfile::tempdir().unwrap();
    let (container, out) = (folder.path().join("c.safetensors"), folder.path().join("out.safetensors"));
    made_up::container_without_masked_vectors(&repo("tests/golden/refiner-like"), &container);
    let export = Squeeze::new("export").arg(&container).with("--to", "coremltools").out(&out);
    export.ends_with(2).says(&["--small-weights move"]);
    export.clone().with("--layout", "linear").ends_with(2).says(&["--layout has no effect"]);
    export.with("--small-weights", "move").succeeds().says(&["weights moved above 2^-10"]);
}
