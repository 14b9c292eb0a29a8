//! The layers before the first stage and after the last one. The joint solver calibrates them like
//! all other layers.

use std::path::Path;

use sdxl_squeeze::container::Container;
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::model::Unobserved;
use sdxl_squeeze::model::unet::Unet;
use sdxl_squeeze::pipeline::{Guidance, PipelineFolder, PromptEncoder, UnetWeights};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::noise;
use tch::{Kind, Tensor};

use crate::squeeze::Squeeze;
use crate::support::emoji;

/// A config with 3-bit palettes for the layers outside of the stages only.
const CONFIG: &str = "
sequencing: sublayer
target: dense
palettize:
  weight_threshold: 0
  global_config:
    n_bits: 3
    granularity: per_tensor
  module_name_configs:
    '(down_blocks|mid_block|up_blocks)\\..*': null
";

fn compress(config: &Path, out: &Path, more: &[&str]) {
    Squeeze::new("compress").config_file(config).model(emoji()).out(out).samples(24, 8).args(more).succeeds();
}

#[test]
fn the_joint_solver_sees_what_their_errors_do() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("ends.yaml");
    std::fs::write(&config, CONFIG).unwrap();
    let pipeline = PipelineFolder::open(&emoji()).unwrap();
    let weights = pipeline.unet_weights().unwrap();
    let dense = Unet::resident(pipeline.unet.clone(), weights.source(Placement::CPU), &Silent).unwrap();
    // The prompt and the timesteps are not those of the calibration.
    let encoder = PromptEncoder::load(&pipeline, Placement::CPU).unwrap();
    let told = Guidance::encode(&encoder, &pipeline, "a picture of an owl", None, 4.0, (64, 64)).unwrap().conditioning;
    let noisy = |seed| noise(&[2, 4, 16, 16], seed, Kind::Float).unwrap();
    let outputs = |unet: &Unet| -> Tensor {
        let at = |time: u64| unet.forward(&noisy(time), time as f64, &told, &mut Unobserved).unwrap();
        Tensor::stack(&[17, 333, 777, 950].map(at), 0)
    };
    let expected = outputs(&dense);
    let error = |name: &str, more: &[&str]| -> f64 {
        let out = folder.path().join(name);
        compress(&config, &out, more);
        let container = Container::open(&out.join("unet.squeezed.safetensors")).unwrap();
        let names: Vec<String> = container.layers().map(|layer| layer.name).collect();
        assert!(names.len() == 6, "{names:?}");
        let unet = Unet::resident(pipeline.unet.clone(), UnetWeights::from(&container).source(Placement::CPU), &Silent).unwrap();
        ((outputs(&unet) - &expected).norm() / expected.norm()).double_value(&[])
    };
    let joint = error("joint", &[]);
    let sequential = error("sequential", &["--solver", "sequential"]);
    assert!(joint < 0.7 * sequential, "{joint} and {sequential}");
    // Calibration stage by stage, without the dense outputs as targets, is also better than no
    // calibration.
    let staged = error("staged", &["--sequencing", "stage", "--target", "current"]);
    assert!(staged < 0.9 * sequential, "{staged} and {sequential}");
}
