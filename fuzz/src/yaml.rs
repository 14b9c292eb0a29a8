//! Reads a run config and resolves its rules for the layers of a small model.

use sdxl_squeeze::Error;
use sdxl_squeeze::codebook::LayerKind;
use sdxl_squeeze::config::{LayerInfo, RunConfig};

/// Layers of both kinds, inside and outside of stages, with channels that common group sizes do or
/// do not divide.
fn layers() -> Vec<LayerInfo> {
    let rows: [(&str, Option<&str>, LayerKind, &[i64]); 6] = [
        ("conv_in", None, LayerKind::Conv2d, &[8, 4, 3, 3]),
        ("down_blocks.0.resnets.0.conv1", Some("down_blocks.0"), LayerKind::Conv2d, &[8, 8, 3, 3]),
        ("down_blocks.0.resnets.0.time_emb_proj", Some("down_blocks.0"), LayerKind::Linear, &[8, 32]),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", Some("mid_block"), LayerKind::Linear, &[24, 24]),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.2", Some("mid_block"), LayerKind::Linear, &[7, 96]),
        ("conv_out", None, LayerKind::Conv2d, &[4, 8, 3, 3]),
    ];
    rows.into_iter()
        .map(|(name, stage, module_type, shape)| LayerInfo {
            name: name.into(),
            stage: stage.map(str::to_owned),
            module_type,
            shape: shape.to_vec(),
        })
        .collect()
}

/// Runs one input, which is the config file.
pub fn run(data: &[u8]) {
    let path = "config.yaml".as_ref();
    match RunConfig::parse(path, data) {
        Err(why) => {
            // Every mistake is reported in one line.
            let Error::Config { mistakes } = why else { panic!("another error than mistakes: {why}") };
            assert!(!mistakes.is_empty());
            assert!(mistakes.iter().all(|mistake| !mistake.to_string().contains('\n')), "{mistakes:?}");
        }
        Ok(config) => {
            // A config that is written and read again stays equal.
            let text = config.to_yaml();
            match RunConfig::parse(path, text.as_bytes()) {
                Ok(again) => assert_eq!(again, config, "{text}"),
                Err(why) => panic!("what was written is refused: {why}\n{text}"),
            }
            let resolution = config.resolve(&layers());
            assert_eq!(resolution.layers.len(), layers().len());
            let _ = resolution.checked();
        }
    }
}
