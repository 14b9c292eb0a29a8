//! Operations and layers of any network.

use half::f16;
use sdxl_model::ConvGeometry;
use sdxl_model::checkpoint::TensorSpec;
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::Task;
use tch::Tensor;

use crate::element::{ArrayType, Element};
use crate::literal::Literal;
use crate::options::Layout;
use crate::program::{Arg, ProgramBuilder, Var};
use crate::weights::{StoredTensors, add, add_wide};

/// A network's program under construction, and the weights that it reads.
///
/// Operations and layers are named after the modules of the checkpoint. Tokens are [b, n, c], or
/// [b, c, 1, n] in the split layout.
pub(super) struct Network<'a> {
    pub program: ProgramBuilder,
    pub layout: Layout,
    /// The dtype of states and weights: fp16 or fp32.
    pub element: Element,
    weights: &'a dyn StoredTensors,
    /// Every tensor that was read, in order.
    read: Vec<TensorSpec>,
    task: Task<'a>,
}

impl<'a> Network<'a> {
    /// A network in fp16 without operations; `task` advances with each tensor.
    pub(super) fn new(program: ProgramBuilder, weights: &'a dyn StoredTensors, layout: Layout, task: Task<'a>) -> Self {
        Network { program, layout, element: Element::F16, weights, read: Vec::new(), task }
    }

    /// A number in the network's dtype.
    pub(super) fn number(&self, value: f64) -> Literal {
        match self.element {
            Element::F32 => Literal::Float(value as f32),
            _ => Literal::Half(f16::from_f64(value)),
        }
    }

    /// A vector of equal numbers in the network's dtype; equal vectors are one constant.
    pub(super) fn repeated(&mut self, name: &str, value: f16, length: u64) -> Result<Var> {
        self.program.repeated(name, self.element, value, length)
    }

    /// The finished program.
    ///
    /// # Errors
    /// [`Error::Internal`] if it did not read exactly the tensors `expected`, in their order.
    pub(super) fn finish(self, expected: &[TensorSpec]) -> Result<ProgramBuilder> {
        if self.read == expected {
            Ok(self.program)
        } else {
            Err(Error::internal("the program does not read the network's tensors in their order"))
        }
    }

    pub(super) fn op<const N: usize>(&mut self, kind: &str, name: &str, parameters: [(&'static str, Arg); N]) -> Result<Var> {
        self.program.op(kind, name, &parameters)
    }

    /// An operation with the one parameter `x`.
    pub(super) fn unary(&mut self, kind: &str, name: &str, x: &Var) -> Result<Var> {
        self.op(kind, name, [("x", x.into())])
    }

    /// An operation with the parameters `x` and `y`.
    pub(super) fn binary(&mut self, kind: &str, name: &str, x: &Var, y: &Var) -> Result<Var> {
        self.op(kind, name, [("x", x.into()), ("y", y.into())])
    }

    pub(super) fn reshape(&mut self, name: &str, x: &Var, shape: &[u64]) -> Result<Var> {
        self.op("reshape", name, [("x", x.into()), ("shape", Literal::sizes(shape)?.into())])
    }

    pub(super) fn transpose(&mut self, name: &str, x: &Var, perm: &[i32]) -> Result<Var> {
        self.op("transpose", name, [("x", x.into()), ("perm", Literal::Ints(perm.to_vec()).into())])
    }

    pub(super) fn expand(&mut self, name: &str, x: &Var, axis: i32) -> Result<Var> {
        self.op("expand_dims", name, [("x", x.into()), ("axes", Literal::Ints(vec![axis]).into())])
    }

    /// [b, c] to [b, c, 1, 1], one axis at a time, as coremltools does.
    pub(super) fn append_axes(&mut self, name: &str, x: &Var) -> Result<Var> {
        let row = self.expand(&format!("{name}.row"), x, 2)?;
        self.expand(&format!("{name}.pixel"), &row, 3)
    }

    pub(super) fn cast(&mut self, name: &str, x: &Var, dtype: &str) -> Result<Var> {
        self.op("cast", name, [("x", x.into()), ("dtype", Literal::text(dtype).into())])
    }

    pub(super) fn concat(&mut self, name: &str, values: &[&Var], axis: i32) -> Result<Var> {
        let parameters =
            [("values", Arg::Vars(values)), ("axis", Literal::Int(axis).into()), ("interleave", Literal::Bool(false).into())];
        self.op("concat", name, parameters)
    }

    pub(super) fn einsum(&mut self, name: &str, equation: &str, x: &Var, y: &Var) -> Result<Var> {
        self.op("einsum", name, [("values", Arg::Vars(&[x, y])), ("equation", Literal::text(equation).into())])
    }

    /// The rows of `x` along `axis` that `indices` name.
    pub(super) fn gather(&mut self, name: &str, x: &Var, indices: &Var, axis: i32) -> Result<Var> {
        let parameters = [
            ("x", x.into()),
            ("indices", indices.into()),
            ("axis", Literal::Int(axis).into()),
            ("batch_dims", Literal::Int(0).into()),
            ("validate_indices", Literal::Bool(false).into()),
        ];
        self.op("gather", name, parameters)
    }

    /// Positions `start` to `start + length` of one axis.
    pub(super) fn slice(&mut self, name: &str, x: &Var, axis: usize, start: u64, length: u64) -> Result<Var> {
        let rank = x.shape().len();
        let (mut begin, mut end, mut to_end) = (vec![0; rank], x.shape().to_vec(), vec![true; rank]);
        (begin[axis], end[axis], to_end[axis]) = (start, start + length, false);
        let parameters = [
            ("x", x.into()),
            ("begin", Literal::sizes(&begin)?.into()),
            ("end", Literal::sizes(&end)?.into()),
            ("end_mask", Literal::Bools(to_end).into()),
        ];
        self.op("slice_by_index", name, parameters)
    }

    /// Two halves of the channels of tokens.
    pub(super) fn halve(&mut self, name: &str, x: &Var) -> Result<[Var; 2]> {
        let half = self.channels(x) / 2;
        let parameters = [
            ("x", x.into()),
            ("split_sizes", Literal::sizes(&[half; 2])?.into()),
            ("axis", Literal::Int(self.channel_axis_literal()).into()),
        ];
        let halves = self.program.ops("split", name, &parameters)?;
        halves.try_into().map_err(|_| Error::internal(format!("`{name}` did not become two halves")))
    }

    /// Twice as many rows and columns of [b, c, h, w].
    pub(super) fn upsample(&mut self, name: &str, x: &Var) -> Result<Var> {
        let parameters = [
            ("x", x.into()),
            ("scale_factor_height", Literal::Float(2.0).into()),
            ("scale_factor_width", Literal::Float(2.0).into()),
        ];
        self.op("upsample_nearest_neighbor", name, parameters)
    }

    /// The checkpoint's tensor `name`, stored in the shape `stored`, as a constant of `shape`.
    pub(super) fn tensor(&mut self, name: &str, stored: &[u64], shape: &[u64]) -> Result<Var> {
        self.task.advance(name);
        let stored: Vec<i64> = stored.iter().map(|n| *n as i64).collect();
        let tensor = self.weights.read_stored(name, &stored)?;
        self.read.push(TensorSpec { name: name.to_owned(), shape: stored });
        let added = match self.element {
            Element::F32 => add_wide(&mut self.program, name, shape, tensor),
            _ => add(&mut self.program, name, shape, tensor),
        };
        added.map_err(Error::layer(name))
    }

    /// The Conv2d `name` with a bias, over [b, c, h, w]. `after` is additional padding below and to
    /// the right.
    pub(super) fn conv2d(
        &mut self,
        name: &str,
        x: &Var,
        output: i64,
        kernel: i64,
        geometry: ConvGeometry,
        after: i64,
    ) -> Result<Var> {
        let [weight, bias] = self.kernel(name, x, output, kernel)?;
        let ConvGeometry { stride, padding, .. } = geometry;
        let pad = [padding[0], padding[0] + after, padding[1], padding[1] + after].map(|n| n as i32);
        self.conv(name, x, &weight, &bias, stride.map(|n| n as i32), pad)
    }

    /// The Conv2d `name` of stride 1 that makes the program's output `out`, in fp32.
    pub(super) fn conv2d_to(&mut self, out: &str, name: &str, x: &Var, output: i64, kernel: i64) -> Result<Var> {
        if self.element == Element::F32 {
            let [weight, bias] = self.kernel(name, x, output, kernel)?;
            return self.conv(out, x, &weight, &bias, [1, 1], [(kernel / 2) as i32; 4]);
        }
        let made = self.conv2d(name, x, output, kernel, ConvGeometry::new(1, kernel / 2), 0)?;
        self.cast(out, &made, "fp32")
    }

    /// The weight and the bias of the Conv2d `name` over `x`.
    fn kernel(&mut self, name: &str, x: &Var, output: i64, kernel: i64) -> Result<[Var; 2]> {
        let [_, input, _, _] = x.dims(name)?;
        let (output, kernel) = (output as u64, kernel as u64);
        let shape = [output, input, kernel, kernel];
        let weight = self.tensor(&format!("{name}.weight"), &shape, &shape)?;
        Ok([weight, self.tensor(&format!("{name}.bias"), &[output], &[output])?])
    }

    fn conv(&mut self, name: &str, x: &Var, weight: &Var, bias: &Var, strides: [i32; 2], pad: [i32; 4]) -> Result<Var> {
        let pad_type = if pad == [0; 4] { "valid" } else { "custom" };
        let parameters = [
            ("x", x.into()),
            ("weight", weight.into()),
            ("bias", bias.into()),
            ("strides", Literal::Ints(strides.to_vec()).into()),
            ("pad_type", Literal::text(pad_type).into()),
            ("pad", Literal::Ints(pad.to_vec()).into()),
            ("dilations", Literal::Ints(vec![1, 1]).into()),
            ("groups", Literal::Int(1).into()),
        ];
        self.op("conv", name, parameters)
    }

    /// The Linear `name` over the channels of tokens: a `linear`, or in the split layout a 1x1
    /// convolution.
    pub(super) fn dense(&mut self, name: &str, x: &Var, output: i64, bias: bool) -> Result<Var> {
        let (output, input) = (output as u64, self.channels(x));
        let mut shape = vec![output, input];
        if self.layout == Layout::SplitEinsum {
            shape.extend([1, 1]);
        }
        let weight = self.tensor(&format!("{name}.weight"), &[output, input], &shape)?;
        let bias = match bias {
            true => self.tensor(&format!("{name}.bias"), &[output], &[output])?,
            // coremltools always writes one.
            false => self.repeated(&format!("zeros_{output}"), f16::ZERO, output)?,
        };
        match self.layout {
            Layout::Linear => self.op("linear", name, [("x", x.into()), ("weight", (&weight).into()), ("bias", (&bias).into())]),
            Layout::SplitEinsum => self.conv(name, x, &weight, &bias, [1, 1], [0; 4]),
        }
    }

    /// The number of channels of tokens.
    pub(super) fn channels(&self, x: &Var) -> u64 {
        match self.layout {
            Layout::Linear => *x.shape().last().expect("tokens have an axis of channels"),
            Layout::SplitEinsum => x.shape()[1],
        }
    }

    /// The axis of the channels of tokens, as a parameter.
    pub(super) fn channel_axis_literal(&self) -> i32 {
        match self.layout {
            Layout::Linear => -1,
            Layout::SplitEinsum => 1,
        }
    }

    /// A constant of fp32 values of `shape`.
    pub(super) fn floats(&mut self, name: &str, shape: &[u64], values: &Tensor) -> Result<Var> {
        let values = Vec::<f32>::try_from(&values.f_flatten(0, -1)?)?;
        self.program.floats(name, shape, &values)
    }

    pub(super) fn input(&mut self, name: &str, array: ArrayType) -> Var {
        self.program.input(name, array)
    }
}
