//! Synthesized pipelines have the right sizes, and weights with which they compute sensible values.

use sdxl_squeeze::device::Placement;
use sdxl_squeeze::inspect::inspect;
use sdxl_squeeze::model::Unobserved;
use sdxl_squeeze::model::unet::{Conditioning, Unet};
use sdxl_squeeze::pipeline::PipelineFolder;
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::noise;
use sdxl_squeeze::synth::{Preset, synthesize, synthesize_single_file};
use tch::{Kind, Tensor};

use crate::squeeze::Squeeze;

/// Keys and values of the UNet config that stabilityai/stable-diffusion-xl-base-1.0 publishes.
pub(crate) const PUBLISHED_SDXL_BASE: &str = r#"{
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0", "act_fn": "silu",
    "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "center_input_sample": false,
    "class_embed_type": null, "class_embeddings_concat": false, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "cross_attention_dim": 2048, "cross_attention_norm": null,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
    "dual_cross_attention": false, "encoder_hid_dim": null, "encoder_hid_dim_type": null, "flip_sin_to_cos": true,
    "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_only_cross_attention": null,
    "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 32,
    "num_attention_heads": null, "num_class_embeds": null, "only_cross_attention": false, "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": false,
    "resnet_time_scale_shift": "default", "sample_size": 128, "time_cond_proj_dim": null, "time_embedding_act_fn": null,
    "time_embedding_dim": null, "time_embedding_type": "positional", "timestep_post_act": null,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": null,
    "use_linear_projection": true
}"#;

#[test]
fn inspect_counts_sdxl_base_from_its_config_alone() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), PUBLISHED_SDXL_BASE).unwrap();
    let ended = Squeeze::new("inspect").arg(folder.path()).succeeds();
    ended.says(&["2,567,463,684 parameters, no weights here"]);
    assert!(!ended.text().contains("WARN"), "{ended}");
    let found = inspect(folder.path()).unwrap();
    let layers: Vec<_> = found.stages.iter().flat_map(|stage| &stage.layers).collect();
    let elements: i64 = layers.iter().map(|layer| layer.shape.iter().product::<i64>()).sum();
    assert_eq!((layers.len(), elements), (794, 2_565_880_320));
    let of_stages: i64 = found.stages[1..found.stages.len() - 1]
        .iter()
        .flat_map(|stage| &stage.layers)
        .map(|layer| layer.shape.iter().product::<i64>())
        .sum();
    assert_eq!(of_stages, 2_558_566_400);
    assert_eq!(found.bytes, 5_134_927_368);
}

#[test]
fn a_tiny_pipeline_draws_and_is_the_same_every_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["a", "b"] {
        synthesize(Preset::Tiny, &path(name), 3, Kind::Half, &Silent).unwrap();
    }
    synthesize(Preset::Tiny, &path("c"), 4, Kind::BFloat16, &Silent).unwrap();
    let weights = |name: &str| std::fs::read(path(name).join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    assert_eq!(weights("a"), weights("b"));
    assert_ne!(weights("a"), weights("c"));
    for name in ["a", "c"] {
        let (model, picture) = (path(name), path(&format!("{name}.png")));
        let run = Squeeze::new("generate").model(model).args(["--prompt", "a cat", "--steps", "2", "-o"]).arg(picture);
        let ended = run.succeeds();
        assert!(!ended.text().contains("WARN"), "{ended}");
    }
}

#[test]
fn a_single_file_has_the_weights_of_the_folder() {
    let here = tempfile::tempdir().unwrap();
    let [folder, file, exported] = ["folder", "synth.safetensors", "exported.safetensors"].map(|name| here.path().join(name));
    let run = || Squeeze::new("synth").args(["--preset", "tiny", "--seed", "5"]);
    run().out(&folder).succeeds();
    std::fs::write(&file, "an older file").unwrap();
    run().args(["--single-file", "--overwrite"]).out(&file).succeeds();
    // `export --to single-file` was compared with diffusers.
    Squeeze::new("export").arg(&folder).with("--to", "single-file").out(&exported).succeeds();
    assert!(std::fs::read(&file).unwrap() == std::fs::read(&exported).unwrap());
    synthesize_single_file(Preset::Tiny, &file, 6, Kind::Half, &Silent).unwrap();
    assert!(std::fs::read(&file).unwrap() != std::fs::read(&exported).unwrap());
    // Only the files that were asked for are there.
    assert_eq!(std::fs::read_dir(here.path()).unwrap().count(), 3);
}

#[test]
fn made_up_weights_keep_activations_within_fp16() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("model");
    synthesize(Preset::Tiny, &root, 0, Kind::Half, &Silent).unwrap();
    let folder = PipelineFolder::open(&root).unwrap();
    let weights = folder.unet_weights().unwrap();
    let unet = Unet::resident(folder.unet.clone(), weights.source(Placement::CPU), &Silent).unwrap();
    let random = |shape: &[i64]| noise(shape, shape.len() as u64, Kind::Float).unwrap();
    let conditioning = Conditioning {
        encoder_hidden_states: random(&[1, 77, 80]),
        text_embeds: random(&[1, 48]),
        time_ids: Tensor::from_slice(&[64f32, 64.0, 0.0, 0.0, 64.0, 64.0]).unsqueeze(0),
        timestep_cond: None,
    };
    let output = unet.forward(&random(&[1, 4, 8, 8]), 500.0, &conditioning, &mut Unobserved).unwrap();
    let deviation = output.std(true).double_value(&[]);
    assert!((0.05..20.0).contains(&deviation), "{deviation}");
}
