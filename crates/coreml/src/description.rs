//! The description of a package's inputs and outputs.

use super::element::{ArrayType, Element};
use super::portion::{HIDDEN_STATES, SILU_TEMB, SKIPS};
use super::program::Var;
use super::proto::specification::array_feature_type::ArrayDataType;
use super::proto::specification::{ArrayFeatureType, FeatureDescription, FeatureType, feature_type};

/// The description of an input or output.
pub(super) fn feature(var: &Var) -> FeatureDescription {
    FeatureDescription {
        name: var.name.clone(),
        short_description: about(&var.name).to_owned(),
        r#type: Some(feature_type(&var.operand.array)),
    }
}

/// An array's type in the form of descriptions.
pub(super) fn feature_type(array: &ArrayType) -> FeatureType {
    let data_type = match array.element {
        Element::F32 => ArrayDataType::Float32,
        Element::F16 => ArrayDataType::Float16,
        Element::I32 => ArrayDataType::Int32,
        Element::Bool | Element::Text | Element::Unsigned(_) => ArrayDataType::InvalidArrayDataType,
    };
    let shape = array.shape.iter().map(|n| *n as i64).collect();
    let array = ArrayFeatureType { shape, data_type: data_type as i32 };
    FeatureType { is_optional: false, r#type: Some(feature_type::Type::MultiArrayType(array)) }
}

fn about(name: &str) -> &'static str {
    match name {
        "sample" => {
            "Noisy latents, scaled as the sampler wants them, and what the model takes beside them: a mask, a picture's latents"
        }
        "timestep" => "The training step that each sample's noise belongs to, 0 to 999",
        "encoder_hidden_states" => "The text encoders' states",
        "time_ids" => "Original size, crop and target size or aesthetic score",
        "text_embeds" => "The pooled text",
        "timestep_cond" => "The sinusoids of 1,000 times the guidance scale less 1",
        "input_ids" => "The ids of one prompt, begin, end and padding included",
        "hidden_embeds" => "The states before the last layer",
        "pooled_outputs" => "The state at the end of the text",
        "z" => "Latents that are not scaled any more: divided by the VAE's scaling factor",
        "image" => "The picture: red, green and blue from -1 to 1",
        "x" => "A picture: red, green and blue from -1 to 1",
        "latent" => "The means of the latents, then the logarithms of their variances, not scaled",
        "noise_pred" => "What the UNet predicts: the noise, or the velocity",
        HIDDEN_STATES => "The image features where the UNet is cut",
        SILU_TEMB => "The embedding of timestep, pooled text and time ids, after its SiLU",
        name if name.starts_with(SKIPS) => "A skip connection that the second chunk uses",
        _ => "",
    }
}
