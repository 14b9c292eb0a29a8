//! The choices for a package.

use std::fmt::{self, Display};

use sdxl_model::unet::UnetConfig;
use squeeze_base::error::{Error, Result};

use super::program::{MAIN, identifier};

/// The highest number of any size of a package.
pub(super) const LARGEST: i64 = 1 << 12;

/// How the transformers compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// `linear` on [b, tokens, channels] and `scaled_dot_product_attention`, as coremltools
    /// converts diffusers' own UNet.
    #[default]
    Linear,
    /// 1x1 convolutions on [b, channels, 1, tokens] and attention head by head, as Apple lays UNets
    /// out for the Neural Engine (apple/ml-stable-diffusion, `SPLIT_EINSUM`).
    SplitEinsum,
}

/// How the program's inputs look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Io {
    /// As diffusers' UNet takes them: `encoder_hidden_states` [b, tokens, channels]; `timestep` and
    /// `time_ids` in fp32.
    #[default]
    Diffusers,
    /// As Apple's Swift pipeline gives them: `encoder_hidden_states` [b, channels, 1, tokens]; all
    /// in fp16.
    Apple,
}

impl Layout {
    /// The layout of this name.
    pub(super) fn of_name(name: &str) -> Option<Self> {
        [Layout::Linear, Layout::SplitEinsum].into_iter().find(|layout| layout.to_string() == name)
    }
}

impl Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layout::Linear => "linear",
            Layout::SplitEinsum => "split-einsum",
        })
    }
}

impl Display for Io {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Io::Diffusers => "diffusers",
            Io::Apple => "apple",
        })
    }
}

/// A function of a package with several: the UNet for one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionSize {
    /// The function's name: letters, digits and underscores, not beginning with a digit.
    pub name: String,
    /// Samples in a call.
    pub batch: i64,
    /// Height and width of the latents.
    pub latents: [i64; 2],
}

/// The sizes that decide the shapes of the tensors between two chunks.
#[derive(Debug, Clone, Copy)]
pub(super) struct BoundarySizes {
    /// Samples in a call.
    pub batch: i64,
    /// Height and width of the latents.
    pub latents: [i64; 2],
    /// How the transformers compute, which decides the rank of the embedding.
    pub layout: Layout,
}

/// Everything that decides a package besides the weights. Shapes in a package are fixed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// How the transformers compute.
    pub layout: Layout,
    /// How the inputs look.
    pub io: Io,
    /// Samples in a call: 2 for classifier-free guidance in one call, 1 for two calls.
    pub batch: i64,
    /// Height and width of the latents: an eighth of the picture's for SDXL.
    pub latents: [i64; 2],
    /// The functions of a package with several, the default one first. They share all weights, and
    /// have batch and latents of their own in the place of [`batch`](Self::batch) and
    /// [`latents`](Self::latents). If there are none, the package has one function, `main`.
    pub functions: Vec<FunctionSize>,
    /// Tokens of the text states.
    pub tokens: i64,
    /// Numbers of size, crop and score: 6 for base, 5 for the refiner.
    pub time_ids: i64,
    /// The author, for the package's own field.
    pub author: String,
    /// The licence, for the package's own field.
    pub license: String,
}

impl Options {
    /// The options for a UNet's own size: both samples of guidance in one call, 77 tokens.
    #[must_use]
    pub fn new(config: &UnetConfig) -> Self {
        Options {
            layout: Layout::default(),
            io: Io::default(),
            batch: 2,
            latents: config.sample_size,
            functions: Vec::new(),
            tokens: 77,
            time_ids: default_time_ids(config),
            author: String::new(),
            license: String::new(),
        }
    }

    /// Checks the options of every function.
    ///
    /// # Errors
    /// As [`check`](Self::check) and [`of_functions`](Self::of_functions).
    pub(super) fn check_all(&self, config: &UnetConfig) -> Result<()> {
        self.of_functions()?.iter().try_for_each(|(_, options)| options.check(config).map(drop))
    }

    /// Checks the options and returns the width of the pooled text:
    /// `projection_class_embeddings_input_dim` without the embedded time ids.
    ///
    /// # Errors
    /// [`Error::Range`] if a size is out of range; [`Error::Argument`] if it does not fit the
    /// architecture.
    pub(super) fn check(&self, config: &UnetConfig) -> Result<i64> {
        for (what, value) in [("pictures in a batch", self.batch), ("tokens", self.tokens), ("time ids", self.time_ids)] {
            if !(1..=LARGEST).contains(&value) {
                return Err(Error::range(format!("the number of {what}"), value, format!("between 1 and {LARGEST}")));
            }
        }
        check_latents(self.latents, config)?;
        if self.io == Io::Apple {
            let [channels, latents] = [config.in_channels, config.out_channels];
            if channels != latents {
                let message = format!("Apple's pipeline gives {latents} channels of latents; this UNet takes {channels}");
                return Err(Error::Argument(message));
            }
            if config.time_cond_proj_dim.is_some() {
                return Err(Error::Argument(
                    "Apple's pipeline does not tell the UNet the guidance scale, as this one needs".into(),
                ));
            }
        }
        let pooled = config.projection_class_embeddings_input_dim - self.time_ids * config.addition_time_embed_dim;
        if pooled < 1 {
            let message = format!("{} time ids leave nothing of the added conditioning for pooled text", self.time_ids);
            return Err(Error::Argument(message));
        }
        Ok(pooled)
    }

    /// The functions of the package: the name of each, and the options with its sizes.
    ///
    /// # Errors
    /// [`Error::Argument`] if two have one name or one size, a name is not an identifier, or there
    /// is one alone.
    pub(super) fn of_functions(&self) -> Result<Vec<(String, Options)>> {
        if self.functions.is_empty() {
            return Ok(vec![(MAIN.to_owned(), self.clone())]);
        }
        if self.functions.len() == 1 {
            let remedy = "set `batch` and `latents` instead";
            return Err(Error::Argument(format!("a package with one function calls it `{MAIN}`: {remedy}")));
        }
        for (i, function) in self.functions.iter().enumerate() {
            let FunctionSize { name, batch, latents } = function;
            if name.starts_with(|c: char| c.is_ascii_digit()) || name.is_empty() || identifier(name) != *name {
                return Err(Error::Argument(format!("`{name}` is no name of a function: letters, digits and underscores")));
            }
            let same = |other: &&FunctionSize| other.name == *name || (other.batch, other.latents) == (*batch, *latents);
            if let Some(other) = self.functions.iter().take(i).find(same) {
                return Err(Error::Argument(format!("the functions `{}` and `{name}` have one name or one size", other.name)));
            }
        }
        let with = |function: &FunctionSize| {
            let (batch, latents) = (function.batch, function.latents);
            (function.name.clone(), Options { batch, latents, functions: Vec::new(), ..self.clone() })
        };
        Ok(self.functions.iter().map(with).collect())
    }

    /// The sizes that decide the tensors between two chunks.
    pub(super) fn boundary_sizes(&self) -> BoundarySizes {
        BoundarySizes { batch: self.batch, latents: self.latents, layout: self.layout }
    }
}

/// Checks the size of a UNet's latents: every level halves it on the way down and doubles it on the
/// way up.
///
/// # Errors
/// [`Error::Range`] if it is not a multiple of what the levels need, or too large.
pub(super) fn check_latents(latents: [i64; 2], config: &UnetConfig) -> Result<()> {
    let step = 1i64 << (config.block_out_channels.len() - 1);
    for size in latents {
        if size % step != 0 || !(step..=LARGEST).contains(&size) {
            let expected = format!("a multiple of {step} between {step} and {LARGEST}");
            return Err(Error::range("the size of the latents", size, expected));
        }
    }
    Ok(())
}

/// The refiner takes 5 numbers: its one text encoder has states and pooled text of equal width.
/// Other UNets take 6.
fn default_time_ids(config: &UnetConfig) -> i64 {
    let of_refiner = config.projection_class_embeddings_input_dim - 5 * config.addition_time_embed_dim;
    if of_refiner == config.cross_attention_dim { 5 } else { 6 }
}
