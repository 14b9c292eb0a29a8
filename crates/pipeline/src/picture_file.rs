//! Pictures and masks from PNG files.

use std::io::Cursor;
use std::path::Path;

use squeeze_base::error::{Error, Result};
use squeeze_base::input::{self, Limit};
use tch::{Kind, Tensor};

use crate::picture::Picture;

/// The most pixels along a side, as in pictures that are drawn.
const LONGEST: u32 = 16_384;

/// A mask: where a picture is drawn anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    /// Pixels per row.
    pub width: u32,
    /// Number of rows.
    pub height: u32,
    /// Row by row, true where the picture is drawn anew.
    pub drawn: Vec<bool>,
}

impl Mask {
    /// Reads a PNG: white is drawn anew, black is kept. As in diffusers, a colour counts by its
    /// grey (ITU-R 601-2), and a grey of 128 or more of 255 is white.
    ///
    /// # Errors
    /// As [`Picture::read_png`].
    pub fn read_png(path: &Path) -> Result<Self> {
        let Picture { width, height, rgb } = Picture::read_png(path)?;
        // As Pillow computes it, in fractions of 65,536.
        let grey = |pixel: &[u8]| {
            let [red, green, blue] = [0, 1, 2].map(|channel| u32::from(pixel[channel]));
            (red * 19_595 + green * 38_470 + blue * 7_471 + 0x8000) >> 16
        };
        Ok(Mask { width, height, drawn: rgb.chunks_exact(3).map(|pixel| grey(pixel) >= 128).collect() })
    }

    /// 1 where the picture is drawn anew, else 0: [1, 1, h, w] in fp32.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is not one value for each pixel.
    pub fn to_tensor(&self) -> Result<Tensor> {
        let values: Vec<f32> = self.drawn.iter().map(|drawn| f32::from(u8::from(*drawn))).collect();
        if values.len() as u64 != u64::from(self.width) * u64::from(self.height) {
            let size = format!("{}x{}", self.width, self.height);
            return Err(Error::Argument(format!("a mask of {size} has {} values", values.len())));
        }
        Ok(Tensor::f_from_slice(&values)?.f_view([1, 1, i64::from(self.height), i64::from(self.width)])?)
    }
}

impl Picture {
    /// Reads a PNG of any kind. Values of 16 bits lose their lower half, and transparency is
    /// dropped, which the log says.
    ///
    /// # Errors
    /// [`Error::Read`], or [`Error::BadFile`] if it is no PNG, or has more than 16,384 pixels along
    /// a side.
    pub fn read_png(path: &Path) -> Result<Self> {
        let content = input::read(path, Limit::PICTURE)?;
        let (picture, is_opaque) = decoded(&content).map_err(|why| Error::bad_file(path, why))?;
        if !is_opaque {
            tracing::warn!("{}: its transparency is ignored", path.display());
        }
        Ok(picture)
    }

    /// Reads a PNG from its bytes, without transparency.
    ///
    /// # Errors
    /// [`Error::Argument`] if they are no PNG, or it has more than 16,384 pixels along a side.
    pub fn from_png_bytes(content: &[u8]) -> Result<Self> {
        decoded(content).map(|(picture, _)| picture).map_err(|why| Error::Argument(format!("a picture {why}")))
    }

    /// Values in [-1, 1], as diffusers' `VaeImageProcessor` makes them: [1, 3, h, w] in fp32.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn to_tensor(&self) -> Result<Tensor> {
        self.check()?;
        let (height, width) = (i64::from(self.height), i64::from(self.width));
        let rows = Tensor::f_from_slice(&self.rgb)?.f_view([1, height, width, 3])?.f_to_kind(Kind::Float)?;
        let unit = rows.f_div_scalar(255.0)?.f_permute([0, 3, 1, 2])?.f_contiguous()?;
        Ok(unit.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?)
    }
}

/// The picture of a PNG, and whether it is opaque everywhere; or what is wrong with the file.
fn decoded(content: &[u8]) -> std::result::Result<(Picture, bool), String> {
    let bad = |why: png::DecodingError| format!("is no PNG that can be read: {why}");
    let mut decoder = png::Decoder::new(Cursor::new(content));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(bad)?;
    let (width, height) = (reader.info().width, reader.info().height);
    if width > LONGEST || height > LONGEST {
        return Err(format!("has {width}x{height} pixels; at most {LONGEST} along a side"));
    }
    let bytes = reader.output_buffer_size().ok_or("is too large to be read")?;
    let mut values = vec![0; bytes];
    let frame = reader.next_frame(&mut values).map_err(bad)?;
    let (colour, _) = reader.output_color_type();
    values.truncate(frame.buffer_size());
    if values.len() as u64 != u64::from(width) * u64::from(height) * colour.samples() as u64 {
        return Err(format!("does not fill its {width}x{height} pixels"));
    }
    let channels = colour.samples();
    let is_opaque = ![2, 4].contains(&channels) || values.chunks_exact(channels).all(|pixel| pixel[channels - 1] == u8::MAX);
    let pixel = |values: &[u8]| if channels < 3 { [values[0]; 3] } else { [values[0], values[1], values[2]] };
    Ok((Picture { width, height, rgb: values.chunks_exact(channels).flat_map(pixel).collect() }, is_opaque))
}
