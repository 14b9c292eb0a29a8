//! What was measured of each picture, from which all figures of a report are computed.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sdxl_pipeline::picture::Picture;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::report::{or_nan, or_nans};

/// The most bytes of a model's pictures that are read: more than a contact sheet may have.
const MOST_PIXEL_BYTES: usize = 1 << 31;

/// A squared distance, and the square that it is a share of.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Share {
    /// ‖compressed - dense‖².
    #[serde(deserialize_with = "or_nan")]
    pub off: f64,
    /// ‖dense‖².
    #[serde(deserialize_with = "or_nan")]
    pub all: f64,
}

/// The sum of distances over the sum of what they are shares of.
pub(super) fn ratio<'a>(shares: impl Iterator<Item = &'a Share>) -> f64 {
    let (off, all) = shares.fold((0.0, 0.0), |(off, all), share| (off + share.off, all + share.all));
    off / all
}

/// What was measured of one picture.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Measured {
    /// Peak signal-to-noise ratio in dB.
    #[serde(deserialize_with = "or_nan")]
    pub psnr: f64,
    /// Structural similarity.
    #[serde(deserialize_with = "or_nan")]
    pub ssim: f64,
    /// LPIPS distance, if its weights were given.
    pub lpips: Option<f64>,
    /// Relative squared error of the latents after each step.
    #[serde(deserialize_with = "or_nans")]
    pub latents: Vec<f64>,
    /// Output error of the UNet on each held-out call of this picture.
    pub calls: Vec<Share>,
    /// For each stage its output error on each of these calls. Empty if stages were not measured.
    pub stages: Vec<Vec<Share>>,
}

/// What was measured of a model's pictures.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ModelResults {
    /// Of each picture.
    pub measured: Vec<Measured>,
    /// Remarks about the runs.
    pub notes: Vec<String>,
    /// The pictures that the report shows.
    #[serde(serialize_with = "as_pngs", deserialize_with = "from_pngs")]
    pub pictures: Vec<Picture>,
}

/// What was measured of some of the pictures, of every model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Results {
    /// Names of the UNet's stages.
    pub stages: Vec<String>,
    /// Of every config.
    pub rows: Vec<ModelResults>,
    /// Of the dense model in another dtype.
    pub noise_floor: Option<ModelResults>,
    /// Remarks about the dense runs.
    pub warnings: Vec<String>,
    /// The dense pictures that the report shows.
    #[serde(serialize_with = "as_pngs", deserialize_with = "from_pngs")]
    pub dense_pictures: Vec<Picture>,
}

impl ModelResults {
    fn append(&mut self, later: ModelResults) {
        self.measured.extend(later.measured);
        self.notes.extend(later.notes);
        self.pictures.extend(later.pictures);
    }
}

impl Results {
    /// Adds the results of the pictures that follow.
    pub(super) fn append(&mut self, later: Results) {
        for (row, more) in self.rows.iter_mut().zip(later.rows) {
            row.append(more);
        }
        if let (Some(floor), Some(more)) = (&mut self.noise_floor, later.noise_floor) {
            floor.append(more);
        }
        self.warnings.extend(later.warnings);
        self.dense_pictures.extend(later.dense_pictures);
    }

    /// What `models` configs have measured of `pictures` pictures is here, of each as much.
    pub(super) fn is_whole(&self, models: usize, pictures: usize) -> bool {
        let all = || self.rows.iter().chain(&self.noise_floor);
        let steps = || all().flat_map(|model| &model.measured).map(|measured| measured.latents.len());
        let stages = |measured: &Measured| {
            measured.stages.is_empty()
                || (measured.stages.len() == self.stages.len()
                    && measured.stages.iter().all(|stage| stage.len() == measured.calls.len()))
        };
        self.rows.len() == models
            && all().all(|model| model.measured.len() == pictures && model.measured.iter().all(stages))
            && steps().all(|count| count > 0 && steps().next() == Some(count))
    }
}

fn as_pngs<S: Serializer>(pictures: &[Picture], serializer: S) -> Result<S::Ok, S::Error> {
    let encoded = pictures.iter().map(|picture| picture.to_png_bytes().map(|bytes| STANDARD.encode(bytes)));
    let encoded: Vec<String> = encoded.collect::<Result<_, _>>().map_err(serde::ser::Error::custom)?;
    encoded.serialize(serializer)
}

fn from_pngs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Picture>, D::Error> {
    let encoded = Vec::<String>::deserialize(deserializer)?;
    let mut bytes = 0;
    let decoded = encoded.iter().map(|text| {
        let png = STANDARD.decode(text).map_err(|why| D::Error::custom(format!("a picture is no base64: {why}")))?;
        let picture = Picture::from_png_bytes(&png).map_err(D::Error::custom)?;
        // A small PNG can hold a large picture of one colour.
        bytes += picture.rgb.len();
        if bytes > MOST_PIXEL_BYTES { Err(D::Error::custom("the pictures are too large")) } else { Ok(picture) }
    });
    decoded.collect()
}
