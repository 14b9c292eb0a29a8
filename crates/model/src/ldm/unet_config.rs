//! The architecture of a UNet, from the shapes of its tensors.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// The shapes of a UNet's tensors under their names in LDM checkpoints, without the prefix.
pub(super) struct UnetShapes<'a>(pub BTreeMap<&'a str, &'a [i64]>);

/// The channels of a level and the depth of the transformer after each of its resnets, where there
/// is one. A transformer of depth 0 has its norm and its projections.
#[derive(Debug, Default, Clone, PartialEq)]
struct Level {
    channels: i64,
    depths: Vec<Option<usize>>,
}

impl Level {
    /// The depth of each transformer; 0 in a level without them. `None` if some resnets have one
    /// and others do not, which no config of diffusers describes.
    fn transformers(&self) -> Option<Vec<usize>> {
        match self.has_attention() {
            true => self.depths.iter().copied().collect(),
            false => Some(vec![0; self.depths.len()]),
        }
    }

    fn has_attention(&self) -> bool {
        self.depths.iter().any(Option::is_some)
    }
}

/// The width of an attention head in all published SDXL models.
const HEAD: i64 = 64;

impl UnetShapes<'_> {
    fn dimension(&self, name: &str, axis: usize) -> Option<i64> {
        self.0.get(name)?.get(axis).copied()
    }

    /// The input channels of the first convolution: 4, 8 of CosXL Edit, 9 for inpainting.
    pub(super) fn in_channels(&self) -> Option<i64> {
        self.dimension("input_blocks.0.0.weight", 1).or_else(|| self.dimension("conv_in.weight", 1))
    }

    /// The width of the embedded guidance scale, which an LCM's UNet is told; its name is one in
    /// all checkpoints. `None` of other UNets.
    pub(super) fn time_cond_proj_dim(&self) -> Option<i64> {
        self.dimension("time_embedding.cond_proj.weight", 1)
    }

    /// The width of the text states.
    pub(super) fn cross_attention_dim(&self) -> Option<i64> {
        self.0.iter().find(|(name, _)| name.ends_with(".attn2.to_k.weight")).and_then(|(_, shape)| shape.last().copied())
    }

    /// The depth of the transformer at `path`; `None` if there is none.
    fn depth(&self, path: &str) -> Option<usize> {
        let has = |name: String| self.0.contains_key(name.as_str());
        let blocks = (0..).take_while(|i| has(format!("{path}.transformer_blocks.{i}.norm1.weight"))).count();
        (blocks > 0 || has(format!("{path}.proj_in.weight"))).then_some(blocks)
    }

    /// `config.json` as diffusers would write it; the values that shapes do not tell are those of
    /// the SDXL family. `None` if the tensors are not those of a whole UNet of this family.
    pub(super) fn config(&self) -> Option<Map<String, Value>> {
        let mut levels = vec![Level { channels: self.dimension("input_blocks.0.0.weight", 0)?, depths: Vec::new() }];
        for n in 1.. {
            if self.0.contains_key(format!("input_blocks.{n}.0.op.weight").as_str()) {
                levels.push(Level::default());
                continue;
            }
            let Some(channels) = self.dimension(&format!("input_blocks.{n}.0.out_layers.3.weight"), 0) else { break };
            let level = levels.last_mut()?;
            level.channels = channels;
            level.depths.push(self.depth(&format!("input_blocks.{n}.1")));
        }
        let mut up: Vec<Level> = Vec::new();
        let mut output = 0;
        for level in levels.iter().rev() {
            let blocks = output..=output + level.depths.len();
            output += level.depths.len() + 1;
            let depths = blocks.map(|n| self.depth(&format!("output_blocks.{n}.1"))).collect();
            up.push(Level { channels: level.channels, depths });
        }
        let middle = self.depth("middle_block.1");
        if levels.iter().any(|level| level.depths.is_empty() || level.channels % HEAD != 0 || level.channels == 0) {
            return None;
        }

        let down_depths: Vec<Vec<usize>> = levels.iter().map(Level::transformers).collect::<Option<_>>()?;
        let up_depths: Vec<Vec<usize>> = up.iter().map(Level::transformers).collect::<Option<_>>()?;
        let last = levels.len() - 1;
        // The middle block's transformer is as deep as the first of the last level.
        if let (Some(middle), true) = (middle, levels[last].has_attention())
            && down_depths[last][0] != middle
        {
            return None;
        }
        // A level without transformers has a depth too, which is that of the middle block in the
        // last level.
        let depths: Vec<Value> = levels
            .iter()
            .zip(&down_depths)
            .enumerate()
            .map(|(i, (level, depths))| match (level.has_attention(), middle.filter(|_| i == last)) {
                (false, Some(middle)) => json!(middle),
                (false, None) => json!(1),
                (true, _) => one_or_each(depths),
            })
            .collect();
        let mirrored = down_depths.iter().rev().zip(&up_depths).all(|(down, up)| {
            let first = down[0];
            down.iter().chain(up).all(|depth| *depth == first)
        });
        let reverse = (!mirrored).then(|| up_depths.iter().map(|depths| one_or_each(depths)).collect::<Vec<_>>());
        let middle_block = match (middle.is_some(), self.0.keys().any(|name| name.starts_with("middle_block."))) {
            (true, _) => json!("UNetMidBlock2DCrossAttn"),
            (false, true) => json!("UNetMidBlock2D"),
            (false, false) => Value::Null,
        };
        let resnets: Vec<usize> = levels.iter().map(|level| level.depths.len()).collect();
        let channels: Vec<i64> = levels.iter().map(|level| level.channels).collect();
        let types = |levels: &[Level], attention: &str, plain: &str| {
            levels.iter().map(|level| if level.has_attention() { attention } else { plain }.to_owned()).collect::<Vec<_>>()
        };
        let is_linear =
            self.0.iter().find(|(name, _)| name.ends_with(".proj_in.weight")).is_none_or(|(_, shape)| shape.len() == 2);
        let config = json!({
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": channels.iter().map(|channels| channels / HEAD).collect::<Vec<_>>(),
            "block_out_channels": channels,
            "center_input_sample": false,
            "cross_attention_dim": self.cross_attention_dim()?,
            "down_block_types": types(&levels, "CrossAttnDownBlock2D", "DownBlock2D"),
            "downsample_padding": 1,
            "flip_sin_to_cos": true,
            "freq_shift": 0,
            "in_channels": self.in_channels()?,
            "layers_per_block": if resnets.iter().all(|n| *n == resnets[0]) { json!(resnets[0]) } else { json!(resnets) },
            "mid_block_type": middle_block,
            "norm_eps": 1e-5,
            "norm_num_groups": 32,
            "out_channels": self.dimension("out.2.weight", 0)?,
            "projection_class_embeddings_input_dim": self.dimension("label_emb.0.0.weight", 1)?,
            "reverse_transformer_layers_per_block": reverse,
            "sample_size": 128,
            "time_cond_proj_dim": self.time_cond_proj_dim(),
            "transformer_layers_per_block": depths,
            "up_block_types": types(&up, "CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": is_linear,
        });
        config.as_object().cloned()
    }
}

/// One number for equal depths, else the depth of each transformer.
fn one_or_each(depths: &[usize]) -> Value {
    if depths.iter().all(|depth| *depth == depths[0]) { json!(depths[0]) } else { json!(depths) }
}
