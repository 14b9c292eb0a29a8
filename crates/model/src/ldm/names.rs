//! The tensors of a network under the names of a single-file checkpoint.

use std::collections::BTreeMap;

use squeeze_base::error::{Error, Result};

use crate::checkpoint::{TensorSpec, View};
use crate::text::{ClipText, TextConfig};
use crate::unet::{StageName, UnetChain};
use crate::vae::{VaeConfig, VaeDecoder, VaeEncoder};

/// The stored tensors of a network, each with the network's tensors that it holds. The names are
/// those of the LDM and sgm repositories, without the prefix of the part.
///
/// The table is derived from the network, so that it holds for any number of levels and blocks.
/// Source: `convert_ldm_unet_checkpoint`, `convert_ldm_vae_checkpoint` and
/// `convert_open_clip_checkpoint` in diffusers' `loaders/single_file_utils.py`.
#[derive(Debug, Clone)]
pub struct Names {
    views: BTreeMap<String, Vec<View>>,
    /// Whether matrices of the attention are stored as 1x1 convolutions.
    is_vae: bool,
}

/// A module of a network: its path, its path in the file, and whether it is a resnet.
struct Module {
    network: String,
    stored: String,
    is_resnet: bool,
}

impl Module {
    fn new(network: impl Into<String>, stored: impl Into<String>) -> Self {
        Module { network: network.into(), stored: stored.into(), is_resnet: false }
    }

    fn resnet(network: impl Into<String>, stored: impl Into<String>) -> Self {
        Module { is_resnet: true, ..Module::new(network, stored) }
    }

    /// The stored name of the tensor `name`, if it is in this module.
    fn stored_name(&self, name: &str, resnet_leaves: &[(&str, &str)]) -> Option<String> {
        let leaf = name.strip_prefix(&self.network)?.strip_prefix('.')?;
        let renamed = self.is_resnet.then(|| {
            let (layer, kind) = leaf.rsplit_once('.')?;
            let (_, stored) = resnet_leaves.iter().find(|(network, _)| *network == layer)?;
            Some(format!("{stored}.{kind}"))
        });
        Some(format!("{}.{}", self.stored, renamed.flatten().as_deref().unwrap_or(leaf)))
    }
}

impl Names {
    /// The tensors of a UNet, under `model.diffusion_model.` in a whole checkpoint.
    ///
    /// # Errors
    /// [`Error::Argument`] naming a tensor that has no name in such files.
    pub fn of_unet(chain: &UnetChain) -> Result<Self> {
        const LEAVES: [(&str, &str); 6] = [
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
            ("conv_shortcut", "skip_connection"),
        ];
        Self::of_modules(chain.tensors()?, &unet_modules(chain), &LEAVES)
    }

    /// The tensors of a VAE, of decoder and encoder, under `first_stage_model.` in a whole
    /// checkpoint.
    ///
    /// # Errors
    /// As [`of_unet`](Self::of_unet).
    pub fn of_vae(config: &VaeConfig) -> Result<Self> {
        let tensors = [VaeDecoder::tensors(config)?, VaeEncoder::tensors(config)?].concat();
        let modules = vae_modules(config.block_out_channels.len());
        Ok(Names { is_vae: true, ..Self::of_modules(tensors, &modules, &[("conv_shortcut", "nin_shortcut")])? })
    }

    /// The tensors of a text encoder in transformers' names, as CLIP-L is stored.
    ///
    /// # Errors
    /// If libtorch cannot make a tensor at all.
    pub fn of_clip(config: &TextConfig) -> Result<Self> {
        let tensors = ClipText::tensors(config)?.into_iter();
        let views = tensors.map(|spec| (spec.name.clone(), vec![View::whole(spec.name)])).collect();
        Ok(Names { views, is_vae: false })
    }

    /// The tensors of a text encoder in OpenCLIP's names: query, key and value of an attention in
    /// one tensor, and the projection transposed.
    #[must_use]
    pub fn of_open_clip(config: &TextConfig) -> Self {
        const WHOLE: [(&str, &str); 5] = [
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ];
        let mut views = BTreeMap::new();
        let mut whole = |stored: String, network: String| views.insert(stored, vec![View::whole(network)]);
        whole("token_embedding.weight".into(), "text_model.embeddings.token_embedding.weight".into());
        whole("positional_embedding".into(), "text_model.embeddings.position_embedding.weight".into());
        for kind in ["weight", "bias"] {
            whole(format!("ln_final.{kind}"), format!("text_model.final_layer_norm.{kind}"));
            for i in 0..config.num_hidden_layers {
                for (stored, network) in WHOLE {
                    whole(
                        format!("transformer.resblocks.{i}.{stored}.{kind}"),
                        format!("text_model.encoder.layers.{i}.{network}.{kind}"),
                    );
                }
            }
        }
        for kind in ["weight", "bias"] {
            for i in 0..config.num_hidden_layers {
                let parts = ["q_proj", "k_proj", "v_proj"].into_iter().enumerate();
                let network = |name| format!("text_model.encoder.layers.{i}.self_attn.{name}.{kind}");
                let parts = parts.map(|(part, name)| View::part(network(name), part, 3));
                views.insert(format!("transformer.resblocks.{i}.attn.in_proj_{kind}"), parts.collect());
            }
        }
        if config.projection_dim.is_some() {
            views.insert("text_projection".into(), vec![View::transposed("text_projection.weight")]);
        }
        Names { views, is_vae: false }
    }

    fn of_modules(tensors: Vec<TensorSpec>, modules: &[Module], resnet_leaves: &[(&str, &str)]) -> Result<Self> {
        let mut views = BTreeMap::new();
        for TensorSpec { name, .. } in tensors {
            let stored = modules.iter().find_map(|module| module.stored_name(&name, resnet_leaves));
            let stored = stored.ok_or_else(|| Error::Argument(format!("`{name}` has no name in single-file checkpoints")))?;
            views.insert(stored, vec![View::whole(name)]);
        }
        Ok(Names { views, is_vae: false })
    }

    /// The network's tensors in the stored tensor `stored`. A name that is not in the table is left
    /// as it is, for the check of the tensors to refuse or to ignore it.
    #[must_use]
    pub fn views(&self, stored: &str) -> Vec<View> {
        self.views.get(stored).cloned().unwrap_or_else(|| vec![View::whole(stored)])
    }

    /// The shape in which a checkpoint stores `views`, of which the first is of `shape` in the
    /// network.
    #[must_use]
    pub fn stored_shape(&self, views: &[View], shape: &[i64]) -> Vec<i64> {
        let mut stored = shape.to_vec();
        if let (Some(rows), true) = (stored.first_mut(), views.len() > 1) {
            *rows *= views.len() as i64;
        }
        if views.iter().any(|view| view.transposed) {
            stored.reverse();
        }
        if self.is_vae && views.iter().any(|view| VaeDecoder::is_linear(&view.name)) {
            stored.extend([1, 1]);
        }
        stored
    }

    /// The stored tensors by name, each with the views of the network on it.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[View])> {
        self.views.iter().map(|(stored, views)| (stored.as_str(), views.as_slice()))
    }
}

/// Input blocks, middle block and output blocks are numbered through; a block is a resnet, then the
/// transformer that follows it, then the upsampling of the stage. A downsampling is a block of its
/// own.
fn unet_modules(chain: &UnetChain) -> Vec<Module> {
    let mut modules = vec![
        Module::new("time_embedding.linear_1", "time_embed.0"),
        Module::new("time_embedding.linear_2", "time_embed.2"),
        Module::new("time_embedding.cond_proj", "time_embedding.cond_proj"),
        Module::new("add_embedding.linear_1", "label_emb.0.0"),
        Module::new("add_embedding.linear_2", "label_emb.0.2"),
        Module::new("conv_in", "input_blocks.0.0"),
        Module::new("conv_norm_out", "out.0"),
        Module::new("conv_out", "out.2"),
    ];
    let (mut input, mut output) = (1, 0);
    for stage in chain.stages() {
        let name = stage.name();
        let mut middle = 0;
        let last = stage.resnets().len().saturating_sub(1);
        for i in 0..stage.resnets().len() {
            let (resnet, attention) = (format!("{name}.resnets.{i}"), format!("{name}.attentions.{i}"));
            let has_attention = stage.transformers().get(i).is_some();
            match name {
                StageName::Down(_) => {
                    modules.push(Module::resnet(resnet, format!("input_blocks.{input}.0")));
                    modules.push(Module::new(attention, format!("input_blocks.{input}.1")));
                    input += 1;
                }
                StageName::Mid => {
                    modules.push(Module::resnet(resnet, format!("middle_block.{middle}")));
                    modules.push(Module::new(attention, format!("middle_block.{}", middle + 1)));
                    middle += 1 + usize::from(has_attention);
                }
                StageName::Up(_) => {
                    modules.push(Module::resnet(resnet, format!("output_blocks.{output}.0")));
                    modules.push(Module::new(attention, format!("output_blocks.{output}.1")));
                    if i == last {
                        let place = 1 + usize::from(has_attention);
                        let stored = format!("output_blocks.{output}.{place}.conv");
                        modules.push(Module::new(format!("{name}.upsamplers.0.conv"), stored));
                    }
                    output += 1;
                }
            }
        }
        if matches!(name, StageName::Down(_)) && stage.resample().is_some() {
            modules.push(Module::new(format!("{name}.downsamplers.0.conv"), format!("input_blocks.{input}.0.op")));
            input += 1;
        }
    }
    modules
}

/// The decoder's levels are numbered from full resolution, which comes last in diffusers.
fn vae_modules(levels: usize) -> Vec<Module> {
    /// More resnets than a level may have in [`VaeConfig`].
    const RESNETS: usize = 66;
    let mut modules = vec![Module::new("quant_conv", "quant_conv"), Module::new("post_quant_conv", "post_quant_conv")];
    for half in ["encoder", "decoder"] {
        modules.push(Module::new(format!("{half}.conv_in"), format!("{half}.conv_in")));
        modules.push(Module::new(format!("{half}.conv_norm_out"), format!("{half}.norm_out")));
        modules.push(Module::new(format!("{half}.conv_out"), format!("{half}.conv_out")));
        for i in 0..2 {
            modules.push(Module::resnet(format!("{half}.mid_block.resnets.{i}"), format!("{half}.mid.block_{}", i + 1)));
        }
        for (network, stored) in [("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")] {
            modules.push(Module::new(format!("{half}.mid_block.attentions.0.{network}"), format!("{half}.mid.attn_1.{stored}")));
        }
    }
    for level in 0..levels {
        let (down, up) = (format!("encoder.down_blocks.{level}"), format!("decoder.up_blocks.{}", levels - 1 - level));
        for k in 0..RESNETS {
            modules.push(Module::resnet(format!("{down}.resnets.{k}"), format!("encoder.down.{level}.block.{k}")));
            modules.push(Module::resnet(format!("{up}.resnets.{k}"), format!("decoder.up.{level}.block.{k}")));
        }
        modules.push(Module::new(format!("{down}.downsamplers.0.conv"), format!("encoder.down.{level}.downsample.conv")));
        modules.push(Module::new(format!("{up}.upsamplers.0.conv"), format!("decoder.up.{level}.upsample.conv")));
    }
    modules
}
