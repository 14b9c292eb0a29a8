//! Every key of a config, declared once.
//!
//! Each declaration is `NAME: type = ("name", kind, default, flag)`; its comment is the text of
//! `docs/config.md`, of the JSON schema and, up to its first full stop, of the flag's help. After a
//! change, `UPDATE=1 cargo test --test it -- config::reference` writes the docs and the schema
//! anew.

use std::path::PathBuf;

use sdxl_model::scheduler::SpacingKind;
use sdxl_pipeline::LoraFile;
use squeeze_codebook::{BitWidth, Effort, NmRatio, OnMisfit, PruneMethod};

use super::key::{Declared, Flag, Key, Kind, Preset, Reach, Section};
use super::kinds;
use super::tree::{Node, Value};
use super::words::{Feed, GranularityWord, SequencingWord, SolverKind, Target, TimestepWeighting, TuneWeighting, ValuesWord};

/// Declares the keys of a section, and the section.
macro_rules! keys {
    (
        $(#[doc = $about:literal])+
        $module:ident $section:literal $(settings $settings:ident)? $(sections [$($nested:ident),+])? {
            $(
                $(#[doc = $doc:literal])+
                $key:ident: $type:ty = ($name:literal, $kind:expr, $default:expr $(, flag $flag:expr)? $(, formerly $old:literal)?);
            )*
        }
    ) => {
        $(#[doc = $about])+
        pub(super) mod $module {
            use super::*;

            $(
                $(#[doc = $doc])+
                pub(in crate::config) const $key: Key<$type> = Key {
                    name: $name,
                    kind: $kind,
                    default: $default,
                    doc: concat!($($doc),+),
                    flag: keys!(@option $($flag)?),
                    formerly: keys!(@option $($old)?),
                };
            )*

            pub(in crate::config) const SECTION: Section = Section {
                name: $section,
                doc: concat!($($about),+),
                keys: &[$(&$key as &dyn Declared),*],
                settings: keys!(@option $(&super::$settings::SECTION)?),
                sections: &[$($(&super::$nested::SECTION),+)?],
            };
        }
    };
    (@option) => { None };
    (@option $value:expr) => { Some($value) };
}

keys! {
    /// A run of sdxl-squeeze.
    root "the config" sections [model, calibration, prune, palettize, text_encoders, vae, joint, budget, tune] {
        /// How mask, weights and palettes are found. `joint` chooses the three of a layer together,
        /// for the least error of its output. `sequential` prunes by SparseGPT and then makes
        /// palettes without looking at the inputs, as coremltools does.
        SOLVER: SolverKind = (
            "solver",
            Kind::WORD,
            Preset::Absent("`joint`; `sequential` with `algorithm: magnitude`, `values: int` or `values: nf4`"),
            flag Flag::new("solver", "SOLVER").resets(&["sequencing", "target"])
        );
        /// Which inputs a layer is compressed for. `sublayer`: those that the already compressed
        /// layers before it produce. `stage`: those that the dense layers of its stage produce,
        /// which takes fewer passes over the samples.
        SEQUENCING: SequencingWord = (
            "sequencing",
            Kind::WORD,
            Preset::Absent("`sublayer`; `stage` with `solver: sequential`"),
            flag Flag::new("sequencing", "ORDER").resets(&["target"]),
            formerly "granularity"
        );
        /// Which outputs a compressed layer is fitted to. `dense`: those of the dense network,
        /// which corrects errors of earlier layers; it needs `solver: joint` and `sequencing:
        /// sublayer`. `current`: those of the layer's own dense weights.
        TARGET: Target = (
            "target",
            Kind::WORD,
            Preset::Absent("`dense` where solver and `sequencing` permit it, else `current`"),
            flag Flag::new("target", "OUTPUTS")
        );
    }
}

keys! {
    /// The model, and where it is computed.
    model "model" {
        /// The pipeline: a folder in diffusers layout, or a single-file checkpoint.
        PATH: PathBuf = ("path", kinds::PATH, Preset::Absent("`--model` is needed"), flag Flag::new("model", "DIR|FILE"));
        /// Another pipeline, for the configs, tokenizers and parts that a single-file checkpoint
        /// lacks.
        BASE: PathBuf = ("base", kinds::PATH, Preset::Absent("none"), flag Flag::new("base", "DIR|FILE"));
        /// A VAE in the place of the pipeline's own: a folder in diffusers layout or a file.
        VAE: PathBuf = ("vae", kinds::PATH, Preset::Absent("none"), flag Flag::new("vae", "DIR|FILE"));
        /// LoRAs to merge into UNet and text encoders, each with the factor of its changes: LoRA,
        /// LoCon, DoRA, LoHa and LoKr, in the names of diffusers, kohya's scripts or the original
        /// checkpoints.
        LORAS: Vec<LoraFile> = ("loras", kinds::LORAS, Preset::Absent("none"), flag Flag::new("lora", "FILE[:SCALE]"));
        /// Tensors of the LoRAs to leave out: an expression for whole names. Without it a tensor
        /// that matches no module is an error.
        LORA_IGNORE: String = ("lora_ignore", kinds::PATTERN, Preset::Absent("none"), flag Flag::new("lora-ignore", "REGEX"));
        /// Where to compute: cpu, cuda, cuda:N or mps, or several with commas.
        DEVICE: String = ("device", kinds::DEVICES, Preset::Text("cpu"), flag Flag::new("device", "DEVICE"));
        /// Precision of activations. Hessians are fp32 in any case.
        DTYPE: String = ("dtype", kinds::DTYPE, Preset::Text("f32"), flag Flag::new("dtype", "DTYPE"));
    }
}

keys! {
    /// The samples on which Hessians are built.
    calibration "calibration" {
        /// Calibration prompts, one a line. The dense pipeline draws them. Many and varied prompts
        /// are better: `target: dense` fits three prompts so closely that other pictures get worse.
        PROMPTS: Node = (
            "prompts",
            kinds::PROMPTS,
            Preset::Text("calibration/varied.txt"),
            flag Flag::new("prompts", "FILE").replaces(&["samples"])
        );
        /// Calibration samples made before or elsewhere, as `--samples-out` writes them. No prompt
        /// is drawn then.
        SAMPLES: PathBuf = ("samples", kinds::PATH, Preset::Absent("none"), flag Flag::new("samples", "FILE.safetensors"));
        /// A file of prompts that are encoded but not drawn, which takes no run of the UNet. Their
        /// text states calibrate `to_k` and `to_v` of all cross-attentions, and their pooled text,
        /// at all timesteps, calibrates `time_emb_proj`.
        CAPTIONS: PathBuf = ("captions", kinds::PATH, Preset::Absent("none"), flag Flag::new("captions", "FILE"));
        /// Captions to take, evenly over their file.
        CAPTIONS_NSAMPLES: usize = ("captions_nsamples", kinds::COUNT, Preset::Integer(512));
        /// Weight of a UNet call in the Hessians. `early` weighs by sigma, `log` by ln(1 + sigma).
        /// Neither has improved the bundled model.
        TIMESTEP_WEIGHTING: TimestepWeighting = ("timestep_weighting", Kind::WORD, Preset::Text("uniform"));
        /// UNet calls to calibrate with, evenly over prompts and timesteps.
        CALIBRATION_NSAMPLES: usize = (
            "calibration_nsamples",
            kinds::COUNT,
            Preset::Integer(384),
            flag Flag::new("calibration-nsamples", "N")
        );
        /// Sampler of the calibration runs. `euler`, `euler-ancestral`, `heun`, `ddim`, `ddpm`,
        /// `dpmpp-2m`, `dpmpp-2m-sde`, `dpmpp-sde`, `unipc`, `plms`, `lcm`, `tcd`, `edm-euler`,
        /// `edm-dpmpp-2m`, some also with `-karras`, or a class of diffusers.
        SCHEDULER: String = ("scheduler", kinds::SCHEDULER, Preset::Absent("the model's"), flag Flag::new("scheduler", "NAME"));
        /// Spacing of the sampler's timesteps.
        TIMESTEP_SPACING: SpacingKind = (
            "timestep_spacing",
            Kind::WORD,
            Preset::Absent("the sampler's"),
            flag Flag::new("timestep-spacing", "SPACING")
        );
        /// Share of noise that each step of DDIM or TCD adds.
        ETA: f64 = ("eta", kinds::SHARE, Preset::Number(0.0), flag Flag::new("eta", "ETA"));
        /// Share of the timesteps, from pure noise on, that another model denoises before this one:
        /// the calibration runs pass them, but no sample is taken there. As in diffusers, 0.8 is
        /// the last fifth.
        DENOISING_START: f64 = (
            "denoising_start",
            kinds::SPARSITY,
            Preset::Absent("the model's: 0.8 for a refiner, else 0"),
            flag Flag::new("denoising-start", "SHARE")
        );
        /// Denoising steps of the calibration runs.
        STEPS: usize = (
            "steps",
            kinds::COUNT,
            Preset::Absent("the model's: 20, or the few of a distilled model"),
            flag Flag::new("steps", "N")
        );
        /// Guidance scale of the calibration runs.
        GUIDANCE: f64 = (
            "guidance",
            kinds::NOT_NEGATIVE,
            Preset::Absent("the model's: 5, or none for a distilled model"),
            flag Flag::new("guidance", "G")
        );
        /// Share of the guided prediction that is brought to the deviation of the prompt's own
        /// prediction, against overexposure.
        GUIDANCE_RESCALE: f64 = ("guidance_rescale", kinds::SHARE, Preset::Number(0.0), flag Flag::new("guidance-rescale", "SHARE"));
        /// Negative prompt of the calibration runs.
        NEGATIVE_PROMPT: String = (
            "negative_prompt",
            kinds::PROMPT,
            Preset::Absent("the pipeline's, zeros for SDXL base"),
            flag Flag::new("negative-prompt", "TEXT")
        );
        /// What the UNet is given in the calibration runs. `diffusers`: as in diffusers. `swift`:
        /// as in Apple's Swift pipeline, which encodes the empty negative prompt, gives the time
        /// ids of 1,024 x 1,024 pixels at every size, and samples by PLMS (or DPM++ 2M, if that is
        /// the scheduler). With both, every second prompt is run in the other way.
        MIX: Vec<Feed> = ("mix", kinds::FEEDS, Preset::Texts(&["diffusers"]), flag Flag::new("mix", "FEED"));
        /// Layers left out at the end of the text encoders. They come in addition to the last, as
        /// in diffusers, and the negative prompt and the pooled text pass all layers.
        CLIP_SKIP: usize = ("clip_skip", kinds::REPEATS, Preset::Integer(0), flag Flag::new("clip-skip", "N"));
        /// Encode prompts of more than 77 tokens in pieces, which are cut otherwise. All prompts
        /// then have as many pieces as the longest: shorter ones are filled with pieces of an empty
        /// text.
        LONG_PROMPTS: bool = ("long_prompts", kinds::BOOLEAN, Preset::Boolean(false), flag Flag::new("long-prompts", "BOOL"));
        /// Seed of the calibration runs.
        SEED: u64 = ("seed", kinds::ELEMENTS, Preset::Integer(0), flag Flag::new("seed", "N"));
        /// Height of the calibration runs in pixels.
        HEIGHT: i64 = ("height", kinds::PIXELS, Preset::Absent("the model's"), flag Flag::new("height", "H"));
        /// Width of the calibration runs in pixels.
        WIDTH: i64 = ("width", kinds::PIXELS, Preset::Absent("the model's"), flag Flag::new("width", "W"));
    }
}

keys! {
    /// Which layers are pruned, and how.
    prune "prune" settings prune_settings {
        /// The stages whose layers are pruned: expressions for whole stage names.
        LAYERS: Vec<Node> = (
            "layers",
            kinds::PATTERNS,
            Preset::Texts(&[r"down_blocks\.\d+", "mid_block", r"up_blocks\.\d+"])
        );
        /// How weights to prune are chosen. `magnitude` takes the smallest and needs no
        /// calibration.
        ALGORITHM: PruneMethod = ("algorithm", Kind::WORD, Preset::Text("sparse_gpt"));
    }
}

keys! {
    /// How a layer is pruned.
    prune_settings "prune settings" {
        /// Share of the weights to prune.
        TARGET_SPARSITY: f64 = (
            "target_sparsity",
            kinds::SPARSITY,
            Preset::Number(0.5),
            flag Flag::of_rules("target-sparsity", "S").replaces(&["n_m_ratio"])
        );
        /// Prune n of every m weights of a row, in the place of `target_sparsity`.
        N_M_RATIO: NmRatio = (
            "n_m_ratio",
            kinds::RATIO,
            Preset::Absent("none"),
            flag Flag::of_rules("n-m-ratio", "N:M").replaces(&["target_sparsity"])
        );
        /// Addition to the Hessian's diagonal, as a share of its mean. Layers that the joint solver
        /// only palettizes have 0.03.
        HESSIAN_DAMPENING: f64 = ("hessian_dampening", kinds::NOT_NEGATIVE, Preset::Number(0.01));
        /// Columns that are pruned as one block.
        PROCESSING_GROUP_SIZE: usize = ("processing_group_size", kinds::COUNT, Preset::Integer(128));
    }
}

keys! {
    /// Which layers are palettized, and how.
    palettize "palettize" settings palette_settings {
        /// Treatment of layers whose channels the group size does not divide. They are refused, get
        /// a smaller group, or stay in fp16 (`dense`), as in coremltools.
        ON_MISFIT: OnMisfit = (
            "on_misfit",
            Kind::WORD,
            Preset::Text("error"),
            flag Flag { reach: Reach::PresentSection, ..Flag::new("on-misfit", "TREATMENT") }
        );
        /// Weights of at most this many elements stay fp16.
        WEIGHT_THRESHOLD: u64 = ("weight_threshold", kinds::ELEMENTS, Preset::Integer(2048));
    }
}

keys! {
    /// Which layers of the text encoders are palettized, and how. Their names begin with
    /// `text_encoder.` or `text_encoder_2.`. The table of the tokens' embeddings counts as a
    /// Linear, whose palettes are made without calibration.
    text_encoders "text_encoders" settings palette_settings {
        /// Texts to calibrate with, evenly over the calibration's prompts and captions and the
        /// empty text.
        NSAMPLES: usize = ("nsamples", kinds::COUNT, Preset::Integer(256));
        /// Treatment of layers whose channels the group size does not divide, as in `palettize`.
        ON_MISFIT: OnMisfit = ("on_misfit", Kind::WORD, Preset::Text("error"));
        /// Weights of at most this many elements stay fp16.
        WEIGHT_THRESHOLD: u64 = ("weight_threshold", kinds::ELEMENTS, Preset::Integer(2048));
    }
}

keys! {
    /// Which layers of the VAE are palettized, and how: those of the decoder, and with `encoder`
    /// those of the encoder too.
    vae "vae" settings palette_settings {
        /// Whether the VAE's encoder is palettized too, which image to image needs. Its layers are
        /// `encoder.*` and `quant_conv`; without it they stay fp16.
        ENCODER: bool = ("encoder", kinds::BOOLEAN, Preset::Boolean(false));
        /// Pictures to calibrate with, evenly over the calibration's prompts. The dense pipeline
        /// draws their latents.
        NSAMPLES: usize = ("nsamples", kinds::COUNT, Preset::Integer(8));
        /// Treatment of layers whose channels the group size does not divide, as in `palettize`.
        ON_MISFIT: OnMisfit = ("on_misfit", Kind::WORD, Preset::Text("error"));
        /// Weights of at most this many elements stay fp16.
        WEIGHT_THRESHOLD: u64 = ("weight_threshold", kinds::ELEMENTS, Preset::Integer(2048));
    }
}

keys! {
    /// How a layer is palettized.
    palette_settings "palette settings" {
        /// Bits of a palette index.
        N_BITS: BitWidth = ("n_bits", kinds::BIT_WIDTH, Preset::Integer(4), flag Flag::of_rules("n-bits", "N"));
        /// Whether one palette serves the whole weight, or each group of channels has its own.
        GRANULARITY: GranularityWord = ("granularity", Kind::WORD, Preset::Text("per_tensor"));
        /// Channels that share a palette. Needs `granularity: per_grouped_channel`, which the flag
        /// brings.
        GROUP_SIZE: usize = (
            "group_size",
            kinds::COUNT,
            Preset::Absent("none"),
            flag Flag { implies: Some(("granularity", "per_grouped_channel")), ..Flag::of_rules("group-size", "N") }
        );
        /// Neighbouring output channels that share an index: the palette then has vectors of as
        /// many values. In a pruned layer they also share a bit of the mask, so that they are kept
        /// or pruned together. Where `cluster_dim` does not divide the channels or the groups,
        /// `on_misfit` decides (`smaller_group`: the next smaller one that does). Groups whose
        /// palette would take more than a sixteenth of the bytes of their indices are widened.
        /// Needs `channel_axis: 0` and no scales; Core ML packages then need iOS 18.2 or macOS
        /// 15.2.
        CLUSTER_DIM: usize = (
            "cluster_dim",
            kinds::VECTOR_LENGTH,
            Preset::Integer(1),
            flag Flag::of_rules("cluster-dim", "N")
        );
        /// The channels that are grouped: 0 for output channels, 1 for input channels.
        CHANNEL_AXIS: usize = ("channel_axis", kinds::AXIS, Preset::Integer(0));
        /// Whether each output channel is divided by its largest magnitude first, which is then
        /// stored.
        ENABLE_PER_CHANNEL_SCALE: bool = ("enable_per_channel_scale", kinds::BOOLEAN, Preset::Boolean(false));
        /// Which values the palettes have. `kmeans`: those that fit the weights best. `int` and
        /// `nf4` are common formats to compare with: fixed values, times a scale for each block of
        /// a row. `int`: whole numbers of 4 or 8 bits, symmetric about -0.5; the scale is the
        /// largest magnitude over 7.5 or 127.5. `nf4`: the 16 values of QLoRA; the scale is the
        /// largest magnitude, in fp16. Both need `solver: sequential` and one palette for each
        /// weight; Core ML packages cannot hold them.
        VALUES: ValuesWord = ("values", Kind::WORD, Preset::Text("kmeans"));
        /// With `int` and `nf4`: how many columns of a row share a scale, the columns being those
        /// of the weight flattened to [o, i x kh x kw]. The last block of a row may have fewer.
        BLOCK_SIZE: usize = ("block_size", kinds::COUNT, Preset::Integer(64));
        /// With `int` and `nf4`: feed the error of each column back to the columns after it, as
        /// GPTQ does, which needs calibration. Otherwise each weight is rounded to the nearest
        /// value. Excludes `prune`.
        FEEDBACK: bool = ("feedback", kinds::BOOLEAN, Preset::Boolean(false));
    }
}

keys! {
    /// Effort of the joint solver. The defaults are the settings that pay; less is faster.
    joint "joint" {
        /// Conjugate gradient steps for the kept weights after the mask is chosen, and again at the
        /// end.
        REFIT_STEPS: usize = ("refit_steps", kinds::REPEATS, Preset::Of(|| count(Effort::default().refit_steps)));
        /// Rounds in which pruned weights of high estimated gain are swapped with kept weights of
        /// low cost.
        EXCHANGE_TURNS: usize = ("exchange_turns", kinds::REPEATS, Preset::Of(|| count(Effort::default().exchange_turns)));
        /// Conjugate gradient steps after each round of swaps.
        EXCHANGE_STEPS: usize = ("exchange_steps", kinds::REPEATS, Preset::Of(|| count(Effort::default().exchange_steps)));
        /// Whether weights are rounded to the palette column by column with error feedback, or each
        /// to its nearest entry.
        SWEEP: bool = ("sweep", kinds::BOOLEAN, Preset::Of(|| Value::Boolean(Effort::default().sweep)));
        /// Conjugate gradient steps for the palettes in each round. They lower the error on the
        /// calibration samples, not on others.
        PALETTE_STEPS: usize = ("palette_steps", kinds::REPEATS, Preset::Of(|| count(Effort::default().palette_steps)));
        /// Whether each weight in turn moves to the palette entry that is best given all others.
        POLISH: bool = ("polish", kinds::BOOLEAN, Preset::Of(|| Value::Boolean(Effort::default().polish)));
        /// Rounds of palette steps and polish at most. They end when the error no longer falls.
        TURNS: usize = ("turns", kinds::REPEATS, Preset::Of(|| count(Effort::default().turns)));
        /// Samples on which the effect of errors in each layer's outputs on the network's output is
        /// measured, to move errors to where the network does not notice them; 0 leaves that out.
        /// On a GPU the host then solves the palettized layers.
        OUTPUT_PROBES: usize = (
            "output_probes",
            kinds::REPEATS,
            Preset::Of(|| count(Effort::default().output_probes)),
            flag Flag::new("output-probes", "N")
        );
    }
}

keys! {
    /// A size that the result keeps to, or a closeness that it reaches at the smallest size. Each
    /// layer gets settings of its own; one target is needed.
    budget "budget" {
        /// Mean bits of a compressed weight.
        TARGET_BITS: f64 = (
            "target_bits",
            kinds::MEAN_BITS,
            Preset::Absent("none"),
            flag Flag::new("target-bits", "BITS").replaces(&[
                "target_size",
                "target_error",
                "target_psnr",
                "target_prompts",
                "target_calls",
                "target_solves"
            ])
        );
        /// Bytes of all tensors of the result.
        TARGET_SIZE: u64 = (
            "target_size",
            kinds::SIZE,
            Preset::Absent("none"),
            flag Flag::new("target-size", "SIZE").replaces(&[
                "target_bits",
                "target_error",
                "target_psnr",
                "target_prompts",
                "target_calls",
                "target_solves"
            ])
        );
        /// The largest error of the UNet's output, as `compare` measures it; the smallest size that
        /// reaches it is searched for. The error is the squared distance of the outputs from the
        /// dense model's, divided by their square, on calls of `target_prompts`. The search
        /// compresses several times: see [usage.md](usage.md#targets-of-closeness).
        TARGET_ERROR: f64 = (
            "target_error",
            kinds::PERCENTAGE,
            Preset::Absent("none"),
            flag Flag::new("target-error", "PERCENT").replaces(&["target_bits", "target_size", "target_psnr"])
        );
        /// The lowest mean PSNR of pictures against the dense model's, in dB, as `compare` measures
        /// it; the smallest size that reaches it is searched for. The pictures are those of
        /// `target_prompts`.
        TARGET_PSNR: f64 = (
            "target_psnr",
            kinds::DECIBELS,
            Preset::Absent("none"),
            flag Flag::new("target-psnr", "DB").replaces(&["target_bits", "target_size", "target_error"])
        );
        /// Prompts that `target_error` or `target_psnr` is measured on, one a line. None of them
        /// may be calibrated on.
        TARGET_PROMPTS: Node = (
            "target_prompts",
            kinds::PROMPTS,
            Preset::Text("calibration/judge.txt"),
            flag Flag::new("target-prompts", "FILE")
        );
        /// UNet calls on which the error of the UNet's output is measured.
        TARGET_CALLS: usize = ("target_calls", kinds::COUNT, Preset::Absent("one for each prompt, at least 48"));
        /// Sizes that are compressed to at most in the search for `target_error` or `target_psnr`.
        TARGET_SOLVES: usize = (
            "target_solves",
            kinds::SOLVES,
            Preset::Integer(6),
            flag Flag::new("target-solves", "N")
        );
        /// Fewest bits of a palette index in any layer.
        MIN_BITS: BitWidth = ("min_bits", kinds::BIT_WIDTH, Preset::Integer(2));
        /// Largest sparsity of any layer.
        MAX_SPARSITY: f64 = ("max_sparsity", kinds::SPARSITY, Preset::Number(0.6));
        /// Whether palettes of vectors (`cluster_dim`) are left out, for systems before macOS 15.2
        /// and iOS 18.2.
        NO_VECTORS: bool = (
            "no_vectors",
            kinds::BOOLEAN,
            Preset::Boolean(false),
            flag Flag { reach: Reach::PresentSection, ..Flag::new("no-vectors", "BOOL") }
        );
        /// Samples by which the effect of a layer's error on the network's output is measured.
        PROBES: usize = ("probes", kinds::COUNT, Preset::Integer(8));
    }
}

keys! {
    /// Training of palette entries, norms and biases after the layers are compressed, until the
    /// UNet predicts what the dense one does. Masks, indices and the size stay as they are.
    tune "tune" {
        /// Prompts to tune with, one a line. Their dense trajectories are learned from; a tenth of
        /// them, 20 at most, is held out and judged by. Few prompts overfit: some hundreds are
        /// needed.
        PROMPTS: Node = (
            "prompts",
            kinds::PROMPTS,
            Preset::Absent("the calibration's"),
            flag Flag::new("tune-prompts", "FILE")
        );
        /// How many UNet calls are taken, evenly over prompts and timesteps.
        NSAMPLES: usize = ("nsamples", kinds::COUNT, Preset::Integer(6000));
        /// Steps of tuning.
        STEPS: usize = ("steps", kinds::COUNT, Preset::Integer(100), flag Flag::new("tune-steps", "N"));
        /// UNet calls in each step.
        BATCH: usize = ("batch", kinds::COUNT, Preset::Integer(16));
        /// The share of the mean magnitude of a tensor's values by which a step moves them at most,
        /// about.
        LEARNING_RATE: f64 = ("learning_rate", kinds::NOT_NEGATIVE, Preset::Number(0.0005));
        /// How much the error of a call counts: `effect`, by how far it reaches the final latents,
        /// which is measured, or `uniform`.
        TIMESTEP_WEIGHTING: TuneWeighting = ("timestep_weighting", Kind::WORD, Preset::Text("effect"));
    }
}

/// A default that is a count.
fn count(value: usize) -> Value {
    Value::Integer(i128::try_from(value).expect("i128 holds every usize"))
}
