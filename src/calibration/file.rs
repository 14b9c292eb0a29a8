//! Samples in a file, so that calibration made elsewhere can be used, and made once.

use std::path::Path;

use sdxl_model::checkpoint::{SafetensorsFile, TensorBytes, read_tensor};
use sdxl_model::unet::{Conditioning, UnetConfig};
use squeeze_base::error::{Error, Result};
use squeeze_base::output::write_file;
use squeeze_numerics::device::Placement;
use tch::{Device, Kind, Tensor};

use super::{Calls, Sample, Samples};

/// The file's tensors, n samples of batch b each, in any floating dtype.
const NAMES: [&str; 5] = ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"];

/// The tensor of a UNet that is told the guidance scale.
const TIMESTEP_COND: &str = "timestep_cond";

impl Samples {
    /// Writes the samples as safetensors in fp32: `sample` [n, b, c, h, w], `timestep` `[n]`,
    /// `encoder_hidden_states` [n, b, s, d], `text_embeds` [n, b, p], `time_ids` [n, b, k], and for
    /// a UNet that is told the guidance scale `timestep_cond` [n, b, g].
    ///
    /// # Errors
    /// If there are none, they differ in shape, or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let bytes = self.to_bytes()?;
        write_file(path, |out| out.write_all(&bytes))
    }

    /// The bytes of the file that [`write`](Self::write) writes.
    ///
    /// # Errors
    /// If there are none, or they differ in shape.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let stacked = |pick: fn(&Sample) -> &Tensor| -> Result<Tensor> {
            let rows: Vec<Tensor> = self
                .calls
                .iter()
                .map(|call| Ok(pick(call).f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?))
                .collect::<Result<_>>()?;
            Ok(Tensor::f_stack(&rows, 0)?)
        };
        let timesteps: Vec<f32> = self.calls.iter().map(|call| call.timestep as f32).collect();
        let tensors = [
            stacked(|call| &call.sample)?,
            Tensor::f_from_slice(&timesteps)?,
            stacked(|call| &call.conditioning.encoder_hidden_states)?,
            stacked(|call| &call.conditioning.text_embeds)?,
            stacked(|call| &call.conditioning.time_ids)?,
        ];
        let mut named: Vec<(&str, Tensor)> = NAMES.into_iter().zip(tensors).collect();
        if self.calls.iter().any(|call| call.conditioning.timestep_cond.is_some()) {
            let told = |call: &Sample| call.conditioning.timestep_cond.as_ref().map(Tensor::shallow_clone);
            let rows: Option<Vec<Tensor>> = self.calls.iter().map(told).collect();
            let rows = rows.ok_or_else(|| Error::Argument("only some samples have an embedded guidance scale".into()))?;
            named.push((TIMESTEP_COND, Tensor::f_stack(&rows, 0)?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?));
        }
        let views = named.iter().map(|(name, tensor)| Ok((*name, TensorBytes::of(tensor)?))).collect::<Result<Vec<_>>>()?;
        safetensors::serialize(views, None).map_err(|why| Error::internal(format!("samples cannot be written: {why}")))
    }

    /// The number and shape of the samples that [`read`](Self::read) would give, from the file's
    /// header.
    ///
    /// # Errors
    /// As [`read`](Self::read), except that values are not checked.
    pub fn calls_in(path: &Path, config: &UnetConfig, wanted: usize) -> Result<Calls> {
        let calls = calls(&SafetensorsFile::open(path)?, path, config)?;
        Ok(Calls { count: calls.count.min(wanted), ..calls })
    }

    /// Reads samples written by [`write`](Self::write), or by anybody who knows the layout, for a
    /// UNet of this architecture; the first `wanted` of them.
    ///
    /// # Errors
    /// [`Error::BadFile`] or [`Error::Tensors`] naming what is missing, misshapen or not a number;
    /// [`Error::Changed`].
    pub fn read(path: &Path, config: &UnetConfig, wanted: usize) -> Result<Self> {
        Self::from_file(&SafetensorsFile::open(path)?, config, wanted)
    }

    /// Reads the first `wanted` samples of an open file.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn from_file(file: &SafetensorsFile, config: &UnetConfig, wanted: usize) -> Result<Self> {
        let path = file.path();
        let count = calls(file, path, config)?.count;
        let tensors = NAMES.map(|name| read_tensor(file, name, Placement::CPU));
        let [sample, timestep, states, pooled, ids] = tensors;
        let (sample, timestep, states, pooled, ids) = (sample?, timestep?, states?, pooled?, ids?);
        let told = config.time_cond_proj_dim.map(|_| read_tensor(file, TIMESTEP_COND, Placement::CPU)).transpose()?;
        let mut samples = Samples::default();
        if count < wanted {
            samples.notes.push(format!("{wanted} samples were asked for; {} has {count}", path.display()));
        }
        for index in 0..count.min(wanted) as i64 {
            samples.calls.push(Sample {
                sample: sample.f_get(index)?,
                timestep: timestep.f_double_value(&[index])?,
                conditioning: Conditioning {
                    encoder_hidden_states: states.f_get(index)?,
                    text_embeds: pooled.f_get(index)?,
                    time_ids: ids.f_get(index)?,
                    timestep_cond: told.as_ref().map(|told| told.f_get(index)).transpose()?,
                },
            });
        }
        Ok(samples)
    }
}

/// The samples of a file by its header, checked.
fn calls(file: &SafetensorsFile, path: &Path, config: &UnetConfig) -> Result<Calls> {
    let shape = |name: &str| -> Result<Vec<i64>> {
        let entry = file.entries().get(name);
        entry
            .map(|entry| entry.shape.clone())
            .ok_or_else(|| Error::bad_file(path, format!("has no tensor `{name}`; calibration samples are {}", NAMES.join(", "))))
    };
    let [count, batch, channels, height, width] = shape("sample")?[..] else {
        return Err(Error::bad_file(path, format!("`sample` is {:?}, not [n, b, c, h, w]", shape("sample")?)));
    };
    let states = shape("encoder_hidden_states")?;
    let length = states.get(2).copied().unwrap_or(0);
    let pooled = shape("text_embeds")?.get(2).copied().unwrap_or(0);
    let ids = shape("time_ids")?.get(2).copied().unwrap_or(0);
    let expected = [
        ("sample", vec![count, batch, config.in_channels, height, width]),
        ("timestep", vec![count]),
        ("encoder_hidden_states", vec![count, batch, length, config.cross_attention_dim]),
        ("text_embeds", vec![count, batch, pooled]),
        ("time_ids", vec![count, batch, ids]),
    ];
    let told = config.time_cond_proj_dim.map(|width| (TIMESTEP_COND, vec![count, batch, width]));
    for (name, expected) in expected.into_iter().chain(told) {
        if shape(name)? != expected {
            return Err(Error::bad_file(path, format!("`{name}` is {:?}, not {expected:?}", shape(name)?)));
        }
    }
    let embedded = pooled.saturating_add(ids.saturating_mul(config.addition_time_embed_dim));
    if embedded != config.projection_class_embeddings_input_dim {
        let want = config.projection_class_embeddings_input_dim;
        return Err(Error::bad_file(path, format!("pooled text and time ids make {embedded} numbers; the UNet takes {want}")));
    }
    if [count, batch, length, height, width, channels].contains(&0) {
        return Err(Error::bad_file(path, "has no samples in it"));
    }
    let is_known = |name: &str| NAMES.contains(&name) || (name == TIMESTEP_COND && config.time_cond_proj_dim.is_some());
    if let Some(extra) = file.entries().keys().find(|name| !is_known(name)) {
        return Err(Error::bad_file(path, format!("has the unknown tensor `{extra}`")));
    }
    Ok(Calls { count: usize::try_from(count).unwrap_or(0), batch, height, width, text: length })
}
