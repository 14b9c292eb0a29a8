//! From a prompt to a picture, as `diffusers.StableDiffusionXLPipeline` computes it.

mod folder;
mod generate;
mod image_channels;
mod image_input;
pub mod picture;
mod picture_file;
mod prompt;
mod prompt_options;
mod sampling;
mod start;
mod unet_weights;

pub use folder::{PipelineFolder, TextPart};
pub use generate::{GenerateRequest, Generated, ImageRequest, decode_with, generate, load_vae};
pub use image_channels::ImageChannels;
pub use image_input::PictureEncoder;
pub use picture_file::Mask;
pub use prompt::{Guidance, IMAGE_GUIDANCE, PromptEmbedding, PromptEncoder, time_ids};
pub use prompt_options::PromptOptions;
pub use sampling::{Predictor, sample, sample_from};
pub use start::Start;
pub use unet_weights::{StoredTensor, UnetSource, UnetWeights, verify};
