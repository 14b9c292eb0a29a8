//! `unet/config.json`.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use squeeze_base::error::Result;
use squeeze_base::shorten::shorten;

use crate::checkpoint::ConfigFile;

/// The architecture of an SDXL UNet, as far as it varies (`diffusers.UNet2DConditionModel`).
#[derive(Debug, Clone, PartialEq)]
pub struct UnetConfig {
    /// Latent height and width that the model was trained for; 64 latents of 8 pixels are 512
    /// pixels.
    pub sample_size: [i64; 2],
    /// Latent channels in.
    pub in_channels: i64,
    /// Latent channels out.
    pub out_channels: i64,
    /// Channels of each level.
    pub block_out_channels: Vec<i64>,
    /// Whether each down stage has transformers.
    pub down_attention: Vec<bool>,
    /// Whether each up stage has transformers.
    pub up_attention: Vec<bool>,
    /// The stage between the down and the up stages.
    pub mid_block: MidBlock,
    /// Resnets of each down stage.
    pub layers_per_block: Vec<usize>,
    /// Blocks in each transformer of a level.
    pub transformer_layers_per_block: Vec<Depth>,
    /// Blocks in each transformer of the up stages, if they differ from those of the down stages in
    /// reverse order.
    pub reverse_transformer_layers_per_block: Option<Vec<Depth>>,
    /// Attention heads of each level. The file calls them `attention_head_dim`.
    pub heads: Vec<i64>,
    /// The width of the text states.
    pub cross_attention_dim: i64,
    /// Whether the transformers' projections are Linear.
    pub use_linear_projection: bool,
    /// Groups of every GroupNorm.
    pub norm_num_groups: i64,
    /// Epsilon of the resnets' GroupNorms.
    pub norm_eps: f64,
    /// Padding of the downsampling convolutions; 0 means one row and column after the last.
    pub downsample_padding: i64,
    /// Kernel of conv_in.
    pub conv_in_kernel: i64,
    /// Kernel of conv_out.
    pub conv_out_kernel: i64,
    /// The width of temb.
    pub time_embed_dim: i64,
    /// The width of the embedded guidance scale that is added to the timestep's sinusoids, for
    /// models that were distilled for one call a step (LCM).
    pub time_cond_proj_dim: Option<i64>,
    /// The width of the sinusoids of each time id.
    pub addition_time_embed_dim: i64,
    /// The width of the pooled text and the sinusoids of all time ids together.
    pub projection_class_embeddings_input_dim: i64,
    /// Whether the cosines come before the sines.
    pub flip_sin_to_cos: bool,
    /// Shift of the sinusoids' frequencies.
    pub freq_shift: f64,
    /// Whether the input is mapped from [0, 1] to [-1, 1] first.
    pub center_input_sample: bool,
}

/// The stage in the middle of a UNet (diffusers' `get_mid_block`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MidBlock {
    /// `UNetMidBlock2DCrossAttn`: a resnet, a transformer, a resnet.
    CrossAttention,
    /// `UNetMidBlock2D`: one resnet. In this place diffusers builds it without further layers.
    Resnet,
    /// `null`: the up stages follow the down stages.
    Absent,
}

/// The number of blocks in the transformers of a level.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Depth {
    /// The number of blocks in every transformer of the level.
    Same(usize),
    /// The number of blocks in each transformer of the level.
    Each(Vec<usize>),
}

impl Depth {
    /// The number of blocks in the level's deepest transformer.
    fn deepest(&self) -> usize {
        match self {
            Depth::Same(depth) => *depth,
            Depth::Each(depths) => depths.iter().copied().max().unwrap_or(0),
        }
    }

    /// The number of blocks in transformer `index`.
    ///
    /// # Panics
    /// If the level has no such transformer: [`UnetConfig::parse`] has checked the lists' lengths.
    pub(super) fn of(&self, index: usize) -> usize {
        match self {
            Depth::Same(depth) => *depth,
            Depth::Each(depths) => depths[index],
        }
    }

    /// Whether each of `transformers` transformers has a number of blocks. As in diffusers, further
    /// entries are not used.
    fn covers(&self, transformers: usize) -> bool {
        match self {
            Depth::Same(_) => true,
            Depth::Each(depths) => depths.len() >= transformers,
        }
    }
}

/// A setting that is one number, or one for each level.
#[derive(Deserialize)]
#[serde(untagged)]
enum PerLevel<T> {
    // The first variant, because serde tries them in order and a depth can itself be a list.
    Each(Vec<T>),
    Same(T),
}

impl<T: Clone> PerLevel<T> {
    fn spread(self, levels: usize) -> Vec<T> {
        match self {
            PerLevel::Same(value) => vec![value; levels],
            PerLevel::Each(values) => values,
        }
    }
}

const MAX_LEVELS: usize = 16;
const MAX_DEPTH: usize = 256;
const MAX_WIDTH: i64 = 1 << 17;
/// The largest number of resnets and transformer blocks of all levels together. SDXL base has about
/// 100. The limit bounds the memory for the list of layers of a hostile config.
const MAX_BLOCKS: usize = 1 << 12;

impl UnetConfig {
    /// Reads `path`, usually `unet/config.json`.
    ///
    /// # Errors
    /// If the file cannot be read, asks for something that is not implemented, or contradicts
    /// itself; the key is named.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(ConfigFile::read(path)?)
    }

    /// Takes the architecture from a config file.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(mut file: ConfigFile) -> Result<Self> {
        file.only("_class_name", &[json!("UNet2DConditionModel")])?;
        refuse_other_computations(&mut file)?;
        let mid_block = mid_block(&mut file)?;
        // These keys affect training only, or computations that are refused above.
        file.ignore(&["dropout", "addition_embed_type_num_heads", "upcast_attention", "resnet_skip_time_act_fn"]);

        let block_out_channels: Vec<i64> = file.or("block_out_channels", vec![320, 640, 1280, 1280])?;
        let levels = block_out_channels.len();
        if levels == 0 || levels > MAX_LEVELS {
            return Err(file.error("block_out_channels", format!("has {levels} levels (1 to {MAX_LEVELS} are possible)")));
        }
        let down_attention = block_types(&mut file, "down_block_types", "DownBlock2D", "CrossAttnDownBlock2D", levels)?;
        let up_attention = block_types(&mut file, "up_block_types", "UpBlock2D", "CrossAttnUpBlock2D", levels)?;
        let alike = [json!(false), json!(vec![false; levels])];
        file.only("only_cross_attention", &alike)?;
        let cross_attention_dim = cross_attention_dim(&mut file, levels)?;
        let layers_per_block = file.or("layers_per_block", PerLevel::Same(2))?.spread(levels);
        let transformer_layers_per_block =
            file.or("transformer_layers_per_block", PerLevel::Same(Depth::Same(1)))?.spread(levels);
        let reverse_transformer_layers_per_block: Option<Vec<Depth>> = file.optional("reverse_transformer_layers_per_block")?;
        let heads = file.or("attention_head_dim", PerLevel::Same(8))?.spread(levels);
        let sample_size = match file.or("sample_size", PerLevel::Same(128))? {
            PerLevel::Same(size) => [size, size],
            PerLevel::Each(sizes) => match sizes[..] {
                [height, width] => [height, width],
                _ => return Err(file.error("sample_size", "must be one number or two")),
            },
        };
        let time_embed_dim = file.or("time_embedding_dim", block_out_channels[0].saturating_mul(4))?;
        let config = UnetConfig {
            sample_size,
            in_channels: file.or("in_channels", 4)?,
            out_channels: file.or("out_channels", 4)?,
            down_attention,
            up_attention,
            mid_block,
            layers_per_block,
            transformer_layers_per_block,
            reverse_transformer_layers_per_block,
            heads,
            cross_attention_dim,
            use_linear_projection: file.or("use_linear_projection", false)?,
            norm_num_groups: file.or("norm_num_groups", 32)?,
            norm_eps: file.or("norm_eps", 1e-5)?,
            downsample_padding: file.or("downsample_padding", 1)?,
            conv_in_kernel: file.or("conv_in_kernel", 3)?,
            conv_out_kernel: file.or("conv_out_kernel", 3)?,
            time_embed_dim,
            time_cond_proj_dim: file.optional("time_cond_proj_dim")?,
            addition_time_embed_dim: file.required("addition_time_embed_dim")?,
            projection_class_embeddings_input_dim: file.required("projection_class_embeddings_input_dim")?,
            flip_sin_to_cos: file.or("flip_sin_to_cos", true)?,
            freq_shift: file.or("freq_shift", 0.0)?,
            center_input_sample: file.or("center_input_sample", false)?,
            block_out_channels,
        };
        config.check(&file)?;
        file.finish();
        Ok(config)
    }

    /// An upper bound on the resnets and transformer blocks of all levels. An up stage has one
    /// resnet more than the down stage of its level.
    fn most_blocks(&self) -> usize {
        let reverse = self.reverse_transformer_layers_per_block.as_deref().unwrap_or_default();
        let deepest = self.transformer_layers_per_block.iter().chain(reverse).map(Depth::deepest).max().unwrap_or(0);
        self.layers_per_block.iter().map(|layers| (2 * layers + 1) * (1 + deepest)).sum()
    }

    /// Checks ranges and lengths, and then the number of blocks, whose sum cannot overflow once the
    /// ranges hold.
    fn check(&self, file: &ConfigFile) -> Result<()> {
        let levels = self.block_out_channels.len();
        let widths = [
            ("sample_size", &self.sample_size[..]),
            ("in_channels", &[self.in_channels]),
            ("out_channels", &[self.out_channels]),
            ("block_out_channels", &self.block_out_channels),
            ("attention_head_dim", &self.heads),
            ("cross_attention_dim", &[self.cross_attention_dim]),
            ("norm_num_groups", &[self.norm_num_groups]),
            ("time_embedding_dim", &[self.time_embed_dim]),
            ("time_cond_proj_dim", self.time_cond_proj_dim.as_slice()),
            ("addition_time_embed_dim", &[self.addition_time_embed_dim]),
            ("projection_class_embeddings_input_dim", &[self.projection_class_embeddings_input_dim]),
        ];
        for (key, values) in widths {
            if let Some(value) = values.iter().find(|value| !(1..=MAX_WIDTH).contains(*value)) {
                return Err(file.error(key, format!("= {value} is not between 1 and {MAX_WIDTH}")));
            }
        }
        for (key, kernel) in [("conv_in_kernel", self.conv_in_kernel), ("conv_out_kernel", self.conv_out_kernel)] {
            if kernel % 2 != 1 || !(1..=31).contains(&kernel) {
                return Err(file.error(key, format!("= {kernel} is not an odd number between 1 and 31")));
            }
        }
        if !(0..=1).contains(&self.downsample_padding) {
            return Err(file.error("downsample_padding", format!("= {} is neither 0 nor 1", self.downsample_padding)));
        }
        if !self.norm_eps.is_finite() || self.norm_eps < 0.0 {
            return Err(file.error("norm_eps", format!("= {} is not a small positive number", self.norm_eps)));
        }
        let lengths = [
            ("layers_per_block", self.layers_per_block.len()),
            ("transformer_layers_per_block", self.transformer_layers_per_block.len()),
            ("attention_head_dim", self.heads.len()),
            ("reverse_transformer_layers_per_block", self.reverse_transformer_layers_per_block.as_ref().map_or(levels, Vec::len)),
        ];
        for (key, length) in lengths {
            if length != levels {
                return Err(file.error(key, format!("has {length} entries for {levels} levels")));
            }
        }
        if let Some(layers) = self.layers_per_block.iter().find(|layers| !(1..=MAX_DEPTH).contains(*layers)) {
            return Err(file.error("layers_per_block", format!("= {layers} is not between 1 and {MAX_DEPTH}")));
        }
        for (key, depths) in [
            ("transformer_layers_per_block", Some(&self.transformer_layers_per_block)),
            ("reverse_transformer_layers_per_block", self.reverse_transformer_layers_per_block.as_ref()),
        ] {
            for (level, depth) in depths.into_iter().flatten().enumerate() {
                let deepest = depth.deepest();
                if deepest > MAX_DEPTH {
                    return Err(file.error(key, format!("= {deepest} at level {level} is more than {MAX_DEPTH}")));
                }
            }
        }
        self.check_depths(file)?;
        let blocks = self.most_blocks();
        if blocks > MAX_BLOCKS {
            return Err(file
                .error("layers_per_block", format!("and the transformers' depths make {blocks} blocks; at most {MAX_BLOCKS}")));
        }
        for (level, (channels, heads)) in self.block_out_channels.iter().zip(&self.heads).enumerate() {
            if channels % self.norm_num_groups != 0 {
                let groups = self.norm_num_groups;
                return Err(
                    file.error("norm_num_groups", format!("= {groups} does not divide the {channels} channels of level {level}"))
                );
            }
            if channels % heads != 0 {
                return Err(file.error(
                    "attention_head_dim",
                    format!("= {heads} heads do not divide the {channels} channels of level {level}"),
                ));
            }
        }
        Ok(())
    }

    /// Checks that every transformer has a number of blocks, where the lists of a level have one
    /// for each. diffusers takes such lists with `reverse_transformer_layers_per_block` only.
    fn check_depths(&self, file: &ConfigFile) -> Result<()> {
        const DOWN: &str = "transformer_layers_per_block";
        const UP: &str = "reverse_transformer_layers_per_block";
        let down = &self.transformer_layers_per_block;
        let short = |key: &str, level: usize, transformers: usize| {
            file.error(key, format!("has fewer entries at level {level} than its {transformers} transformers"))
        };
        let Some(up) = &self.reverse_transformer_layers_per_block else {
            if down.iter().any(|depth| matches!(depth, Depth::Each(_))) {
                return Err(file.error(DOWN, format!("has a list for a level, which needs `{UP}`")));
            }
            return Ok(());
        };
        let last = self.block_out_channels.len() - 1;
        for (level, depth) in down.iter().enumerate() {
            let here = if self.down_attention[level] { self.layers_per_block[level] } else { 0 };
            let mid = usize::from(level == last && self.mid_block == MidBlock::CrossAttention);
            if !depth.covers(here.max(mid)) {
                return Err(short(DOWN, level, here.max(mid)));
            }
        }
        for (index, depth) in up.iter().enumerate() {
            let here = if self.up_attention[index] { self.layers_per_block[last - index] + 1 } else { 0 };
            if !depth.covers(here) {
                return Err(short(UP, index, here));
            }
        }
        Ok(())
    }
}

/// Takes `mid_block_type`, where an absent key is not `null`.
fn mid_block(file: &mut ConfigFile) -> Result<MidBlock> {
    const KEY: &str = "mid_block_type";
    match file.given(KEY) {
        None => Ok(MidBlock::CrossAttention),
        Some(Value::Null) => Ok(MidBlock::Absent),
        Some(Value::String(name)) if name == "UNetMidBlock2DCrossAttn" => Ok(MidBlock::CrossAttention),
        Some(Value::String(name)) if name == "UNetMidBlock2D" => Ok(MidBlock::Resnet),
        Some(other) => {
            let other = shorten(&other.to_string());
            Err(file.error(KEY, format!("= {other} is not supported (UNetMidBlock2DCrossAttn, UNetMidBlock2D and null are)")))
        }
    }
}

/// Refuses keys that ask for a computation that no SDXL model has.
fn refuse_other_computations(file: &mut ConfigFile) -> Result<()> {
    file.exactly("addition_embed_type", &json!("text_time"), &json!(null))?;
    file.only("act_fn", &[json!("silu"), json!("swish")])?;
    file.only("time_embedding_type", &[json!("positional")])?;
    file.only("resnet_time_scale_shift", &[json!("default")])?;
    file.only("attention_type", &[json!("default")])?;
    file.only("mid_block_scale_factor", &[json!(1)])?;
    file.only("resnet_out_scale_factor", &[json!(1)])?;
    for key in ["dual_cross_attention", "mid_block_only_cross_attention", "class_embeddings_concat", "resnet_skip_time_act"] {
        file.only(key, &[json!(false)])?;
    }
    for key in [
        "num_attention_heads",
        "class_embed_type",
        "num_class_embeds",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "time_embedding_act_fn",
        "timestep_post_act",
        "cross_attention_norm",
    ] {
        file.only(key, &[])?;
    }
    Ok(())
}

/// Reads the width of the text states: a number, or a list with the same number for each level.
fn cross_attention_dim(file: &mut ConfigFile, levels: usize) -> Result<i64> {
    let key = "cross_attention_dim";
    let widths = match file.or(key, PerLevel::Same(1280))? {
        PerLevel::Same(width) => return Ok(width),
        PerLevel::Each(widths) => widths,
    };
    match widths.first() {
        Some(width) if widths.len() == levels && widths.iter().all(|other| other == width) => Ok(*width),
        Some(_) | None => Err(file.error(key, format!("must be one number, or the same one for each of {levels} levels"))),
    }
}

/// Reads a list of block types: true for the type `attention`, which has transformers.
fn block_types(file: &mut ConfigFile, key: &str, plain: &str, attention: &str, levels: usize) -> Result<Vec<bool>> {
    let types: Vec<String> = file.required(key)?;
    if types.len() != levels {
        return Err(file.error(key, format!("has {} entries for {levels} levels", types.len())));
    }
    types
        .iter()
        .map(|name| match name.as_str() {
            name if name == plain => Ok(false),
            name if name == attention => Ok(true),
            other => Err(file.error(key, format!("has the unknown block type `{other}` (known: {plain}, {attention})"))),
        })
        .collect()
}
