//! What a comparison found: plain data, no models.

use serde::{Deserialize, Deserializer, Serialize};

use crate::picture::Picture;

/// Compressed models beside the dense one.
///
/// As JSON, fields stand in this order. A number that is not finite is `null`, and NaN when read back. Pictures are left out.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Comparison {
    /// What the report is called.
    pub title: String,
    /// The model, as a user would name it.
    pub model: String,
    /// The program's version.
    pub version: String,
    /// The program, or the command that made this.
    pub created_by: String,
    /// What it ran on: `cpu, 2 threads`, `cuda:0`.
    pub device: String,
    /// The prompts that calibration saw.
    pub calibration: Vec<String>,
    /// The pictures that rows are judged on, in the order of every row's pictures.
    pub judged: Vec<Judged>,
    /// The model that the others are measured against.
    pub dense: Dense,
    /// The compressed models, in the order in which they are shown.
    pub rows: Vec<Row>,
    /// What has to be said of the comparison as a whole.
    pub warnings: Vec<String>,
    /// How each number was measured, a sentence or two each.
    pub how: Vec<String>,
}

/// A picture that every model draws.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Judged {
    /// Its prompt.
    pub prompt: String,
    /// Its noise.
    pub seed: u64,
}

/// The uncompressed model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Dense {
    /// What it is called, e.g. `dense fp16`.
    pub name: String,
    /// Bytes of the UNet's file.
    pub bytes: u64,
    /// Stored bits of a weight.
    #[serde(deserialize_with = "or_nan")]
    pub bits_per_weight: f64,
    /// One picture for each of [`Comparison::judged`].
    #[serde(skip)]
    pub pictures: Vec<Picture>,
}

/// A compressed model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Row {
    /// What it is called, e.g. `40% + 4-bit gs16`.
    pub name: String,
    /// The config as resolved.
    pub config_yaml: String,
    /// The share of weights that was to be zero; absent where none was.
    pub sparsity_asked: Option<f64>,
    /// The share of the compressed weights that is stored as zero, 0 to 1.
    #[serde(deserialize_with = "or_nan")]
    pub sparsity_stored: f64,
    /// Stored bits of a compressed weight, with masks, palettes and scales.
    #[serde(deserialize_with = "or_nan")]
    pub bits_per_weight: f64,
    /// Bytes of the UNet's container.
    pub bytes: u64,
    /// Bytes of the compressed weights in it, with masks, palettes and scales.
    pub compressed_weight_bytes: u64,
    /// ‖compressed - dense‖² / ‖dense‖² of the UNet's outputs on calls that calibration has not seen.
    #[serde(deserialize_with = "or_nan")]
    pub unet_error: f64,
    /// ‖compressed - dense‖² / ‖dense‖² of the latents after each denoising step, mean over the judged pictures.
    #[serde(deserialize_with = "or_nans")]
    pub latent_error_by_step: Vec<f64>,
    /// Peak signal-to-noise ratio to the dense pictures, in dB, at most [`super::metrics::HIGHEST_PSNR`].
    pub psnr: Spread,
    /// Structural similarity to the dense pictures, at most 1.
    pub ssim: Spread,
    /// Seconds that compressing took.
    #[serde(deserialize_with = "or_nan")]
    pub seconds: f64,
    /// The most memory held while compressing, in bytes, where it could be measured.
    pub peak_bytes: Option<u64>,
    /// The stages' output errors, in execution order.
    pub stages: Vec<StageError>,
    /// The compressed layers, in execution order.
    pub layers: Vec<LayerRow>,
    /// One picture for each of [`Comparison::judged`].
    #[serde(skip)]
    pub pictures: Vec<Picture>,
    /// What has to be said of this model.
    pub warnings: Vec<String>,
}

/// A measure over several pictures, of which more is better.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Spread {
    /// The mean.
    #[serde(deserialize_with = "or_nan")]
    pub mean: f64,
    /// The lowest.
    #[serde(deserialize_with = "or_nan")]
    pub worst: f64,
    /// Every picture's, in the order of [`Comparison::judged`].
    #[serde(deserialize_with = "or_nans")]
    pub each: Vec<f64>,
}

impl Spread {
    /// Mean and lowest of `each`; NaN if there are none, or one of them is NaN.
    pub fn of(each: Vec<f64>) -> Self {
        let mean = each.iter().sum::<f64>() / each.len() as f64;
        let worst = each.iter().copied().reduce(|a, b| if a.is_nan() || a < b { a } else { b }).unwrap_or(f64::NAN);
        Spread { mean, worst, each }
    }
}

/// A stage's output error.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct StageError {
    /// `down_blocks.0`, …
    pub name: String,
    /// ‖compressed - dense‖² / ‖dense‖² of what it gives to the next.
    #[serde(deserialize_with = "or_nan")]
    pub error: f64,
}

/// A compressed layer.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct LayerRow {
    /// The checkpoint name, without `.weight`.
    pub name: String,
    /// The stage that it belongs to.
    pub stage: String,
    /// `Linear`, or `Conv2d` with what its window does.
    pub kind: String,
    /// The weight's shape.
    pub shape: Vec<i64>,
    /// Stored bits of a weight, with mask, palettes and scales.
    #[serde(deserialize_with = "or_nan")]
    pub bits_per_weight: f64,
    /// The share of the weight that is stored as zero.
    #[serde(deserialize_with = "or_nan")]
    pub sparsity: f64,
    /// Stored bytes.
    pub bytes: u64,
    /// Calibration vectors that its Hessian was made of; absent where none was needed.
    pub vectors: Option<u64>,
    /// ‖W - W'‖² / ‖W‖² of the weight.
    #[serde(deserialize_with = "or_nan")]
    pub weight_error: f64,
    /// ‖X W - X W'‖² / ‖X W‖² on the calibration inputs, when it was only pruned; absent where it was not.
    pub pruned_error: Option<f64>,
    /// The same of what is stored; absent where no calibration input was seen.
    pub output_error: Option<f64>,
}

impl LayerRow {
    /// The output's error where it was measured, else the weight's.
    pub fn error(&self) -> f64 {
        self.output_error.unwrap_or(self.weight_error)
    }
}

impl Comparison {
    /// The comparison as indented JSON. The same comparison gives the same bytes.
    pub fn to_json(&self) -> String {
        // Writing to a string fails for maps with odd keys alone, and there are no maps here.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// Reads what [`to_json`](Self::to_json) gave; there are no pictures then.
    ///
    /// # Errors
    /// What the parser says.
    pub fn from_json(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }
}

fn or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

fn or_nans<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
    let values = Vec::<Option<f64>>::deserialize(deserializer)?;
    Ok(values.into_iter().map(|value| value.unwrap_or(f64::NAN)).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_spread_has_the_mean_and_the_lowest() {
        let spread = Spread::of(vec![30.0, 20.0, 40.0]);
        assert_eq!((spread.mean, spread.worst), (30.0, 20.0));
        assert!(Spread::of(Vec::new()).mean.is_nan());
        for each in [vec![f64::NAN, 1.0], vec![1.0, f64::NAN], vec![2.0, f64::NAN, 1.0]] {
            assert!(Spread::of(each).worst.is_nan());
        }
    }

    #[test]
    fn fields_keep_their_order_and_odd_numbers_are_null() {
        let row = Row { unet_error: f64::NAN, latent_error_by_step: vec![0.5, f64::INFINITY], ..Row::default() };
        let text = Comparison { title: "t".into(), rows: vec![row], ..Comparison::default() }.to_json();
        let places: Vec<_> =
            ["\"title\"", "\"model\"", "\"judged\"", "\"dense\"", "\"rows\"", "\"unet_error\"", "\"psnr\"", "\"how\""]
                .map(|key| text.find(key).unwrap())
                .into();
        assert!(places.is_sorted());
        assert!(text.contains("\"unet_error\": null"));
        let back = Comparison::from_json(&text).unwrap();
        assert!(back.rows[0].unet_error.is_nan() && back.rows[0].latent_error_by_step[1].is_nan());
        assert_eq!(back.to_json(), text);
    }

    #[test]
    fn what_is_missing_is_an_error() {
        assert!(Comparison::from_json("{}").is_err());
        assert!(Comparison::from_json("").is_err());
    }

    proptest! {
        #[test]
        fn json_gives_back_every_number(
            numbers in proptest::collection::vec(any::<f64>().prop_filter("finite", |x| x.is_finite()), 5),
            bytes in any::<u64>(),
            name in any::<String>(),
            pruned in proptest::option::of(-1e300f64..1e300),
        ) {
            let layer = LayerRow { name: name.clone(), pruned_error: pruned, weight_error: numbers[0], ..LayerRow::default() };
            let row = Row {
                name,
                bytes,
                peak_bytes: Some(bytes),
                unet_error: numbers[1],
                latent_error_by_step: numbers.clone(),
                psnr: Spread::of(numbers),
                layers: vec![layer],
                ..Row::default()
            };
            let comparison = Comparison { rows: vec![row], ..Comparison::default() };
            prop_assume!(comparison.rows[0].psnr.mean.is_finite());
            prop_assert_eq!(&Comparison::from_json(&comparison.to_json()).unwrap(), &comparison);
        }
    }
}
