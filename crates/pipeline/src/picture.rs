//! Pictures and PNG files.

use std::io::Write;
use std::path::Path;

use squeeze_base::error::{Error, Result};
use squeeze_base::output::write_file;
use tch::{Device, Kind, Tensor};

/// A picture of 8-bit red, green and blue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels per row.
    pub width: u32,
    /// Number of rows.
    pub height: u32,
    /// Row by row, three bytes per pixel.
    pub rgb: Vec<u8>,
}

impl Picture {
    /// Converts a VAE's output, [1, 3, h, w] in [-1, 1], into bytes, as diffusers'
    /// `VaeImageProcessor` does.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the output has NaN in it.
    pub fn from_decoded(decoded: &Tensor) -> Result<Self> {
        let unit = Self::to_unit(decoded)?;
        if unit.f_isnan()?.f_any()?.f_int64_value(&[])? != 0 {
            return Err(Error::NotFinite("the decoded picture has NaN in it".into()));
        }
        let bytes = unit.f_mul_scalar(255.0)?.f_round()?.f_to_kind(Kind::Uint8)?;
        let (_, _, height, width) = bytes.size4()?;
        let rows = bytes.f_squeeze_dim(0)?.f_permute([1, 2, 0])?.f_contiguous()?.f_to_device(Device::Cpu)?;
        let mut rgb = vec![0; rows.numel()];
        rows.f_copy_data(&mut rgb, rows.numel())?;
        Ok(Picture { width: width as u32, height: height as u32, rgb })
    }

    /// Maps [-1, 1] to [0, 1], and clamps values outside.
    ///
    /// # Errors
    /// If an operation of libtorch fails.
    pub fn to_unit(decoded: &Tensor) -> Result<Tensor> {
        Ok(decoded.f_mul_scalar(0.5)?.f_add_scalar(0.5)?.f_clamp(0.0, 1.0)?)
    }

    /// Writes a PNG with `texts` (keyword, text) as its metadata.
    ///
    /// # Errors
    /// [`Error::Write`]; an existing file is then left as it was.
    pub fn write_png(&self, path: &Path, texts: &[(&str, String)]) -> Result<()> {
        write_file(path, |out| self.encode(out, texts).map_err(std::io::Error::other))
    }

    /// The picture as the bytes of a PNG, without metadata.
    ///
    /// # Errors
    /// [`Error::Argument`] if the picture's bytes do not match its size.
    pub fn to_png_bytes(&self) -> Result<Vec<u8>> {
        self.check()?;
        let mut bytes = Vec::new();
        self.encode(&mut bytes, &[]).map_err(|why| Error::Argument(format!("a picture cannot be stored: {why}")))?;
        Ok(bytes)
    }

    /// Checks that the picture has pixels, and three bytes for each.
    ///
    /// # Errors
    /// [`Error::Argument`] otherwise.
    pub fn check(&self) -> Result<()> {
        let bytes = u128::from(self.width) * u128::from(self.height) * 3;
        if bytes == 0 || bytes != self.rgb.len() as u128 {
            let size = format!("{}x{}", self.width, self.height);
            return Err(Error::Argument(format!("a picture of {size} has {} bytes, not {bytes}", self.rgb.len())));
        }
        Ok(())
    }

    fn encode(&self, out: &mut dyn Write, texts: &[(&str, String)]) -> Result<(), png::EncodingError> {
        let mut encoder = png::Encoder::new(out, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        for (keyword, text) in texts {
            encoder.add_itxt_chunk((*keyword).to_owned(), text.clone())?;
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.rgb)?;
        writer.finish()
    }
}
