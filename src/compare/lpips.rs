//! LPIPS, the perceptual distance of two pictures, with AlexNet (Zhang et al. 2018,
//! arXiv:1801.03924; version 0.1 of the `lpips` package).

use std::path::Path;

use sdxl_model::checkpoint::{SafetensorsFile, read_tensor};
use sdxl_pipeline::picture::Picture;
use squeeze_base::error::{Error, Result};
use squeeze_numerics::device::Placement;
use squeeze_numerics::sum;
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
        let mut distance = 0.0;
        for (layer, weights) in LAYERS.iter().zip(&self.layers) {
            (a, b) = (features(layer, weights, &a)?, features(layer, weights, &b)?);
            let off = unit(&a)?.f_sub(&unit(&b)?)?.f_square()?.f_mul(&weights.2)?;
            let each = off.f_sum_dim_intlist(&[1_i64][..], false, Kind::Float)?;
            distance += sum::sum(&each)? / each.numel() as f64;
        }
        Ok(distance)
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

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;
    use serde_json::Value;
    use squeeze_numerics::random::noise;

    use super::*;

    fn golden() -> Value {
        serde_json::from_str(include_str!("../../tests/golden/lpips.json")).unwrap()
    }

    /// The weights of the golden values, as `make_lpips.py` draws them.
    fn weights() -> Vec<(String, Tensor)> {
        let drawn = |tensor: &Value| {
            let shape: Vec<i64> = serde_json::from_value(tensor["shape"].clone()).unwrap();
            let name = tensor["name"].as_str().unwrap().to_owned();
            let values = noise(&shape, tensor["seed"].as_u64().unwrap(), Kind::Float).unwrap();
            let fan_in = shape[1..].iter().product::<i64>().max(1) as f64;
            let values = match shape.len() {
                _ if name.starts_with("lin") => values.abs() * 0.1,
                1 => values * 0.1,
                _ => values * (1.4 / fan_in.sqrt()),
            };
            // libtorch's normal numbers differ in their last bits between processors. Means of
            // other numbers would be some 1e-4 off.
            let mean = values.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
            assert!((mean - tensor["mean"].as_f64().unwrap()).abs() < 1e-7, "{name}");
            (name, values)
        };
        let mut all: Vec<(String, Tensor)> = golden()["tensors"].as_array().unwrap().iter().map(drawn).collect();
        // As the package has them: `ScalingLayer` in lpips.py.
        for (name, values) in [("shift", [-0.030_f32, -0.088, -0.188]), ("scale", [0.458, 0.448, 0.450])] {
            all.push((format!("scaling_layer.{name}"), Tensor::from_slice(&values).view([1, 3, 1, 1])));
        }
        all
    }

    fn write(path: &Path, tensors: &[(String, Tensor)]) {
        let bytes = |tensor: &Tensor| -> Vec<u8> {
            let values: Vec<f32> = tensor.flatten(0, -1).try_into().unwrap();
            values.iter().flat_map(|value| value.to_le_bytes()).collect()
        };
        let stored: Vec<(Vec<usize>, Vec<u8>)> = tensors
            .iter()
            .map(|(_, tensor)| (tensor.size().iter().map(|size| *size as usize).collect(), bytes(tensor)))
            .collect();
        let views = tensors.iter().zip(&stored).map(|((name, _), (shape, bytes))| {
            (name.as_str(), TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
        });
        std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn picture(height: i64, width: i64, seed: u64) -> Tensor {
        (noise(&[1, 3, height, width], seed, Kind::Float).unwrap() * 60 + 128).clamp(0, 255).round()
    }

    fn stored(pixels: &Tensor) -> Picture {
        let (_, _, height, width) = pixels.size4().unwrap();
        let rows = pixels.squeeze_dim(0).permute([1, 2, 0]).contiguous().to_kind(Kind::Uint8);
        Picture { width: width as u32, height: height as u32, rgb: rows.flatten(0, -1).try_into().unwrap() }
    }

    #[test]
    fn distances_are_those_of_the_lpips_package() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lpips.safetensors");
        write(&path, &weights());
        let lpips = Lpips::read(&path, Device::Cpu).unwrap();
        for case in golden()["cases"].as_array().unwrap() {
            let number = |value: &Value| value.as_f64().unwrap();
            let (height, width) = (number(&case["height"]) as i64, number(&case["width"]) as i64);
            let [a, b] = [0, 1].map(|index| picture(height, width, case["seeds"][index].as_u64().unwrap()));
            let near = ((&a * 3 + &b) / 4).round();
            for (other, expected) in [&b, &near, &a].into_iter().zip(case["lpips"].as_array().unwrap()) {
                let found = lpips.distance(&stored(&a), &stored(other)).unwrap();
                assert!((found - number(expected)).abs() < 1e-5, "{width}x{height}: {found}, not {expected}");
            }
        }
        let small = stored(&picture(30, 64, 0));
        assert!(lpips.distance(&small, &small).unwrap_err().to_string().contains("31x31"));
        assert!(lpips.distance(&small, &stored(&picture(64, 30, 0))).unwrap_err().is_bad_input());
    }

    #[test]
    fn files_of_other_tensors_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lpips.safetensors");
        let refused = |tensors: &[(String, Tensor)], part: &str| {
            write(&path, tensors);
            let why = Lpips::read(&path, Device::Cpu).unwrap_err();
            assert!(why.is_bad_input() && why.to_string().contains(part), "{why}");
        };
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let mut all = weights();
        all.push(("lins.0.model.1.weight".to_owned(), zeros(&[1, 64, 1, 1])));
        write(&path, &all);
        Lpips::read(&path, Device::Cpu).unwrap();
        all.push(("net.slice6.0.weight".to_owned(), zeros(&[1])));
        refused(&all, "unknown tensor `net.slice6.0.weight`");
        all.pop();
        all[1].1 = zeros(&[63]);
        refused(&all, "is [63], not [64]");
        let _first = all.remove(0);
        refused(&all, "has no tensor `net.slice1.0.weight`");
    }
}
