//! LPIPS, the perceptual distance of two pictures, with AlexNet (Zhang et al. 2018,
//! arXiv:1801.03924; version 0.1 of the `lpips` package).

use std::path::Path;

use sdxl_model::checkpoint::{SafetensorsFile, read_tensor};
use sdxl_pipeline::picture::Picture;
use squeeze_base::error::{Error, Result};
use squeeze_numerics::device::Placement;
use tch::{Device, Kind, Tensor};

/// Least width and height of pictures, in pixels: smaller ones have no pixel after the second
/// pooling.
const LEAST_SIDE: u32 = 31;

/// A convolution of AlexNet's features: its name in `lpips.LPIPS(net='alex').state_dict()`, shape,
/// stride and padding, and whether the features before it are pooled.
struct Layer {
    name: &'static str,
    shape: [i64; 4],
    stride: i64,
    padding: i64,
    pools_first: bool,
}

const LAYERS: [Layer; 5] = [
    Layer { name: "net.slice1.0", shape: [64, 3, 11, 11], stride: 4, padding: 2, pools_first: false },
    Layer { name: "net.slice2.3", shape: [192, 64, 5, 5], stride: 1, padding: 2, pools_first: true },
    Layer { name: "net.slice3.6", shape: [384, 192, 3, 3], stride: 1, padding: 1, pools_first: true },
    Layer { name: "net.slice4.8", shape: [256, 384, 3, 3], stride: 1, padding: 1, pools_first: false },
    Layer { name: "net.slice5.10", shape: [256, 256, 3, 3], stride: 1, padding: 1, pools_first: false },
];

/// AlexNet's features and the weight of each of their channels.
#[derive(Debug)]
pub struct Lpips {
    shift: Tensor,
    scale: Tensor,
    /// Weight and bias of each convolution, and the weights of its channels [1, c, 1, 1].
    layers: Vec<(Tensor, Tensor, Tensor)>,
    sha256: String,
    device: Device,
}

impl Lpips {
    /// Reads the weights from a safetensors file with the names of
    /// `lpips.LPIPS(net='alex').state_dict()`. Its `lins.*` are the same tensors as `lin0` to
    /// `lin4`, and are not read.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::BadFile`] naming the first tensor that is missing, of another
    /// shape, or unknown.
    pub fn read(path: &Path, device: Device) -> Result<Self> {
        let file = SafetensorsFile::open(path)?;
        let mut expected: Vec<(String, Vec<i64>)> =
            ["shift", "scale"].map(|name| (format!("scaling_layer.{name}"), vec![1, 3, 1, 1])).into();
        for (index, layer) in LAYERS.iter().enumerate() {
            expected.push((format!("{}.weight", layer.name), layer.shape.into()));
            expected.push((format!("{}.bias", layer.name), vec![layer.shape[0]]));
            expected.push((format!("lin{index}.model.1.weight"), vec![1, layer.shape[0], 1, 1]));
        }
        let what = "the weights of LPIPS with AlexNet, as docs/usage.md makes them";
        for (name, shape) in &expected {
            let entry = file.entries().get(name.as_str());
            let entry = entry.ok_or_else(|| Error::bad_file(path, format!("has no tensor `{name}`; expected are {what}")))?;
            if entry.shape != *shape {
                return Err(Error::bad_file(path, format!("`{name}` is {:?}, not {shape:?}; expected are {what}", entry.shape)));
            }
        }
        let is_known = |name: &str| name.starts_with("lins.") || expected.iter().any(|(known, _)| known == name);
        if let Some(extra) = file.entries().keys().find(|name| !is_known(name)) {
            return Err(Error::bad_file(path, format!("has the unknown tensor `{extra}`; expected are {what}")));
        }
        let read = |name: &str| read_tensor(&file, name, Placement { device, kind: Kind::Float });
        let layers = LAYERS.iter().enumerate().map(|(index, layer)| {
            let weight = read(&format!("{}.weight", layer.name))?;
            Ok((weight, read(&format!("{}.bias", layer.name))?, read(&format!("lin{index}.model.1.weight"))?))
        });
        let layers = layers.collect::<Result<_>>()?;
        let (shift, scale) = (read("scaling_layer.shift")?, read("scaling_layer.scale")?);
        Ok(Lpips { shift, scale, layers, sha256: file.sha256()?, device })
    }

    /// SHA-256 of the file of the weights, in hex digits.
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The distance of two pictures of one size: 0 for equal ones.
    ///
    /// # Errors
    /// [`Error::Argument`] if the sizes differ, or a side has fewer than 31 pixels.
    pub fn distance(&self, a: &Picture, b: &Picture) -> Result<f64> {
        let size = |picture: &Picture| format!("{}x{}", picture.width, picture.height);
        if (a.width, a.height) != (b.width, b.height) {
            return Err(Error::Argument(format!("pictures of {} and {} cannot be compared", size(a), size(b))));
        }
        if a.width < LEAST_SIDE || a.height < LEAST_SIDE {
            return Err(Error::Argument(format!("LPIPS needs pictures of {LEAST_SIDE}x{LEAST_SIDE} or more, not {}", size(a))));
        }
        let input = |picture: &Picture| -> Result<Tensor> {
            Ok(picture.to_tensor()?.f_to_device(self.device)?.f_sub(&self.shift)?.f_div(&self.scale)?)
        };
        let (mut a, mut b) = (input(a)?, input(b)?);
        let mut sum = 0.0;
        for (layer, weights) in LAYERS.iter().zip(&self.layers) {
            (a, b) = (features(layer, weights, &a)?, features(layer, weights, &b)?);
            let off = unit(&a)?.f_sub(&unit(&b)?)?.f_square()?.f_mul(&weights.2)?;
            let each = off.f_sum_dim_intlist(&[1_i64][..], false, Kind::Float)?;
            sum += each.f_mean(Kind::Float)?.f_double_value(&[])?;
        }
        Ok(sum)
    }
}

/// The features after a convolution and its rectifier: [1, c, h, w].
fn features(layer: &Layer, (weight, bias, _): &(Tensor, Tensor, Tensor), input: &Tensor) -> Result<Tensor> {
    let pooled;
    let input = if layer.pools_first {
        pooled = input.f_max_pool2d([3, 3], [2, 2], [0, 0], [1, 1], false)?;
        &pooled
    } else {
        input
    };
    let (stride, padding) = ([layer.stride; 2], [layer.padding; 2]);
    Ok(input.f_conv2d(weight, Some(bias), stride, padding, [1, 1], 1)?.f_relu()?)
}

/// Features with the length 1 at each pixel.
fn unit(features: &Tensor) -> Result<Tensor> {
    let length = features.f_square()?.f_sum_dim_intlist(&[1_i64][..], true, Kind::Float)?.f_sqrt()?;
    Ok(features.f_div(&length.f_add_scalar(1e-10)?)?)
}
