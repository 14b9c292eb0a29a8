//! Models, configs and prompts as users have them: from other programs, other systems and the cache
//! of a hub.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sdxl_squeeze::config::{RunConfig, read_prompts};
use sdxl_squeeze::container::Container;
use sdxl_squeeze::pipeline::verify;

use crate::squeeze::Squeeze;
use crate::support::{copy, emoji, repo, tiny};

/// The tensors of a file by name: dtype, shape, bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Changes the tensors of a safetensors file.
fn edit(path: &Path, change: impl FnOnce(&mut Tensors)) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Tensors = file
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    let whole = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
    std::fs::write(path, whole).unwrap();
}

/// The latents of the picture that `model` draws in one step.
fn picture(model: &Path, out: &Path) -> Vec<u8> {
    let latents = out.join("latents.safetensors");
    let png = out.join("x.png");
    let run = Squeeze::new("generate").model(model).args(["--prompt", "a cat", "--steps", "1"]);
    run.with("--latents-out", &latents).with("-o", &png).succeeds();
    std::fs::read(latents).unwrap()
}

/// transformers before 4.31 stored the positions 0 to 76 with the weights, as 64-bit integers.
#[test]
fn text_encoders_with_their_positions_stored() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(tiny(), &model);
    for encoder in ["text_encoder", "text_encoder_2"] {
        edit(&model.join(encoder).join("model.safetensors"), |tensors| {
            let positions = (0..77i64).flat_map(i64::to_le_bytes).collect();
            tensors.insert("text_model.embeddings.position_ids".into(), (Dtype::I64, vec![1, 77], positions));
        });
    }
    Squeeze::new("inspect").arg("--summary").arg(&model).succeeds();
    assert!(picture(&model, folder.path()) == picture(tiny(), folder.path()));
}

/// In the cache of the Hugging Face hub, the files in `snapshots/REVISION/` are relative links to
/// `blobs/HASH`.
#[cfg(unix)]
#[test]
fn a_snapshot_of_links_into_a_folder_of_blobs() {
    fn link(from: &Path, snapshot: &Path, blobs: &Path, depth: usize) {
        std::fs::create_dir_all(snapshot).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            let target = snapshot.join(path.file_name().unwrap());
            if path.is_dir() {
                link(&path, &target, blobs, depth + 1);
            } else {
                let blob = format!("{:04}", std::fs::read_dir(blobs).unwrap().count());
                std::fs::copy(&path, blobs.join(&blob)).unwrap();
                std::os::unix::fs::symlink(Path::new(&"../".repeat(depth)).join("blobs").join(blob), target).unwrap();
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (folder.path().join("models--x/blobs"), folder.path().join("models--x/snapshots/0123abcd"));
    std::fs::create_dir_all(&blobs).unwrap();
    link(tiny(), &snapshot, &blobs, 2);
    assert!(picture(&snapshot, folder.path()) == picture(tiny(), folder.path()));

    // The exported pipeline does not depend on the snapshot that it was exported from.
    let out = folder.path().join("out");
    Squeeze::new("compress").config("dense-4bit").model(&snapshot).out(&out).succeeds();
    let (container, dense) = (out.join("unet.squeezed.safetensors"), folder.path().join("dense"));
    Squeeze::new("export").arg(&container).with("--to", "diffusers").model(&snapshot).out(&dense).succeeds();
    std::fs::remove_dir_all(folder.path().join("models--x")).unwrap();
    picture(&dense, folder.path());
}

/// Notepad writes a byte-order mark and ends lines with CR and LF.
#[test]
fn configs_and_prompts_from_windows() {
    let folder = tempfile::tempdir().unwrap();
    let windows = |path: &Path| {
        let there = std::fs::read_to_string(path).unwrap();
        let here = folder.path().join(path.file_name().unwrap());
        std::fs::write(&here, format!("\u{feff}{}", there.replace('\n', "\r\n"))).unwrap();
        here
    };
    let mut configs = 0;
    for entry in std::fs::read_dir(repo("configs")).unwrap().chain(std::fs::read_dir(repo("configs/emoji")).unwrap()) {
        let path = entry.unwrap().path();
        if path.extension() == Some("yaml".as_ref()) {
            assert_eq!(RunConfig::read(&windows(&path)).unwrap(), RunConfig::read(&path).unwrap(), "{}", path.display());
            configs += 1;
        }
    }
    assert!(configs > 10);
    for name in ["calibration/emoji.txt", "calibration/captions.txt"] {
        let prompts = read_prompts(&windows(&repo(name))).unwrap();
        assert_eq!(prompts, read_prompts(&repo(name)).unwrap(), "{name}");
        assert!(prompts.iter().all(|prompt| !prompt.contains(['\r', '\u{feff}'])));
    }
}

/// Latents of 72 pixels are 18 wide. The UNet halves them to 9 and then to 5, so stages have odd
/// sizes.
#[test]
fn pictures_of_72_and_96_pixels() {
    let (folder, model) = (tempfile::tempdir().unwrap(), emoji());
    for (height, width) in [("72", "72"), ("96", "96"), ("72", "96"), ("96", "72")] {
        let png = folder.path().join("x.png");
        let run = Squeeze::new("generate").model(&model).args(["--prompt", "a cat", "--steps", "1"]);
        run.args(["--height", height, "--width", width]).with("-o", &png).succeeds();
        let bytes = std::fs::read(&png).unwrap();
        let side = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()).to_string();
        assert_eq!((side(20), side(16)), (height.to_owned(), width.to_owned()));
    }
}

/// Sets the elements that `which` picks to bytes that are zero except for the last one, which is
/// `last`.
fn fill(tensors: &mut Tensors, name: &str, last: u8, which: impl Fn(usize) -> bool) {
    let (_, shape, data) = tensors.get_mut(name).unwrap_or_else(|| panic!("there is no {name}"));
    let size = data.len() / shape.iter().product::<usize>();
    for (_, element) in data.chunks_mut(size).enumerate().filter(|(at, _)| which(*at)) {
        element.fill(0);
        element[size - 1] = last;
    }
}

#[test]
fn layers_of_zeros_dead_inputs_and_negative_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(tiny(), &model);
    let block = "down_blocks.1.attentions.0.transformer_blocks.0";
    let (zeros, negative) = (format!("{block}.attn1.to_q.weight"), format!("{block}.attn2.to_out.0.weight"));
    edit(&model.join("unet/diffusion_pytorch_model.safetensors"), |tensors| {
        fill(tensors, &zeros, 0, |_| true);
        fill(tensors, &negative, 0x80, |at| at % 2 == 0);
        // The first half of the rows makes the states that the gates are multiplied with. As half
        // of these rows are zero, half of the inputs of `ff.net.2` are always zero.
        let rows = tensors[&format!("{block}.ff.net.0.proj.weight")].1.clone();
        fill(tensors, &format!("{block}.ff.net.0.proj.weight"), 0, |at| at / rows[1] < rows[0] / 4);
        fill(tensors, &format!("{block}.ff.net.0.proj.bias"), 0, |at| at < rows[0] / 4);
    });
    for config in ["emoji/tutorial-s50-4bit-gs16", "emoji/squeeze-s50-4bit-gs16"] {
        let out = folder.path().join(config);
        Squeeze::new("compress").config(config).model(&model).out(&out).samples(4, 3).succeeds();
        let path = out.join("unet.squeezed.safetensors");
        verify(&path).unwrap();
        let container = Container::open(&path).unwrap();
        assert!(container.decode(&zeros).unwrap().iter().all(|value| value.to_f32() == 0.0), "{config}");
        // Pruned elements are stored as +0, even if they were -0.
        let weight = container.weight(&negative).unwrap();
        let (mask, dense) = (weight.mask.as_ref().unwrap(), weight.decode().unwrap());
        assert!(dense.iter().enumerate().all(|(at, value)| mask.get(at) || value.to_bits() == 0));
        for layer in container.layers() {
            assert!(container.decode(&layer.name).unwrap().iter().all(|value| value.is_finite()), "{}", layer.name);
        }
        picture(&model, folder.path());
    }
}
