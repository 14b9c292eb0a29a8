//! The UNet as a program: the same computation as [`crate::model::unet`], in the operations that coremltools writes for it.

mod ends;
mod norm;
mod resnet;
mod stage;
mod transformer;

use half::f16;
use tch::Tensor;

use super::element::ArrayType;
use super::literal::Literal;
use super::options::{Io, Layout, Options};
use super::program::{Arg, ProgramBuilder, Var};
use super::weights::add;
use crate::checkpoint::TensorSpec;
use crate::error::{Error, Result};
use crate::model::ConvGeometry;
use crate::model::unet::UnetChain;
use crate::pipeline::UnetWeights;
use crate::progress::{Progress, Task};

/// A program under construction, and what it is made of.
pub(super) struct Lowering<'a> {
    program: ProgramBuilder,
    weights: UnetWeights<'a>,
    layout: Layout,
    io: Io,
    batch: u64,
    /// SiLU of the embedding of time, text and sizes, which all resnets share: [b, c], or [b, c, 1, 1] in the split layout.
    silu_temb: Option<Var>,
    /// The text states in the layout's own form.
    text: Option<Var>,
    /// The skip connections.
    residuals: Vec<Var>,
    /// Every tensor that was read.
    read: Vec<TensorSpec>,
    task: Task<'a>,
}

/// A program, its inputs and its output.
pub(super) struct Lowered {
    pub program: ProgramBuilder,
    pub inputs: Vec<Var>,
    pub output: Var,
}

/// Lowers a UNet.
///
/// # Errors
/// If an option does not fit it, or a weight cannot be read or written.
pub(super) fn lower(
    chain: &UnetChain,
    weights: UnetWeights,
    options: &Options,
    program: ProgramBuilder,
    progress: &dyn Progress,
) -> Result<Lowered> {
    let config = chain.config();
    let pooled = options.check(config)?;
    let tensors = chain.tensors()?;
    let mut lowering = Lowering {
        program,
        weights,
        layout: options.layout,
        io: options.io,
        batch: options.batch as u64,
        silu_temb: None,
        text: None,
        residuals: Vec::new(),
        read: Vec::new(),
        task: Task::begin(progress, "writing the package", "tensors", tensors.len()),
    };
    let inputs = lowering.inputs(config, options, pooled);
    let mut hidden = lowering.head(config, &inputs)?;
    for stage in chain.stages() {
        hidden = lowering.stage(stage, hidden)?;
    }
    let output = lowering.tail(config, &hidden)?;
    // What is built from a source is the list of a network's tensors; the program must read the same.
    if lowering.read != tensors {
        return Err(Error::Failed("the program does not read the UNet's tensors in their order".into()));
    }
    Ok(Lowered { program: lowering.program, inputs, output })
}

impl Lowering<'_> {
    fn op<'b, const N: usize>(&mut self, kind: &str, name: &str, parameters: [(&'static str, Arg<'b>); N]) -> Result<Var> {
        self.program.op(kind, name, &parameters)
    }

    /// An operation of one value.
    fn unary(&mut self, kind: &str, name: &str, x: &Var) -> Result<Var> {
        self.op(kind, name, [("x", x.into())])
    }

    /// An operation of two values.
    fn binary(&mut self, kind: &str, name: &str, x: &Var, y: &Var) -> Result<Var> {
        self.op(kind, name, [("x", x.into()), ("y", y.into())])
    }

    fn reshape(&mut self, name: &str, x: &Var, shape: &[u64]) -> Result<Var> {
        self.op("reshape", name, [("x", x.into()), ("shape", Literal::sizes(shape).into())])
    }

    fn transpose(&mut self, name: &str, x: &Var, perm: &[i32]) -> Result<Var> {
        self.op("transpose", name, [("x", x.into()), ("perm", Literal::Ints(perm.to_vec()).into())])
    }

    fn expand(&mut self, name: &str, x: &Var, axis: i32) -> Result<Var> {
        self.op("expand_dims", name, [("x", x.into()), ("axes", Literal::Ints(vec![axis]).into())])
    }

    fn cast(&mut self, name: &str, x: &Var, dtype: &str) -> Result<Var> {
        self.op("cast", name, [("x", x.into()), ("dtype", Literal::text(dtype).into())])
    }

    fn concat(&mut self, name: &str, values: &[&Var], axis: i32) -> Result<Var> {
        let parameters =
            [("values", Arg::Vars(values)), ("axis", Literal::Int(axis).into()), ("interleave", Literal::Bool(false).into())];
        self.op("concat", name, parameters)
    }

    /// The checkpoint's tensor `name` as a constant of `shape`.
    fn tensor(&mut self, name: &str, stored: &[u64], shape: &[u64]) -> Result<Var> {
        self.task.advance(name);
        let stored: Vec<i64> = stored.iter().map(|n| *n as i64).collect();
        let tensor = self.weights.read(name, &stored)?;
        self.read.push(TensorSpec { name: name.to_owned(), shape: stored });
        add(&mut self.program, name, shape, tensor).map_err(Error::layer(name))
    }

    /// The Conv2d `name`, with a bias. `after` pads below and to the right only.
    fn conv2d(&mut self, name: &str, x: &Var, output: i64, kernel: i64, geometry: ConvGeometry, after: i64) -> Result<Var> {
        let [_, input, ..] = *x.shape() else { return Err(Error::Failed(format!("`{name}` is given {:?}", x.shape()))) };
        let (output, kernel) = (output as u64, kernel as u64);
        let shape = [output, input, kernel, kernel];
        let weight = self.tensor(&format!("{name}.weight"), &shape, &shape)?;
        let bias = self.tensor(&format!("{name}.bias"), &[output], &[output])?;
        let ConvGeometry { stride, padding, .. } = geometry;
        let pad = [padding[0], padding[0] + after, padding[1], padding[1] + after].map(|n| n as i32);
        self.conv(name, x, &weight, &bias, stride.map(|n| n as i32), pad)
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

    /// The Linear `name` over the channels of `x`: a `linear`, or in the split layout a 1x1 convolution.
    fn dense(&mut self, name: &str, x: &Var, output: i64, bias: bool) -> Result<Var> {
        let output = output as u64;
        let input = x.shape().get(self.channel_axis(x)).copied().unwrap_or_default();
        let mut shape = vec![output, input];
        if self.layout == Layout::SplitEinsum {
            shape.extend([1, 1]);
        }
        let weight = self.tensor(&format!("{name}.weight"), &[output, input], &shape)?;
        let bias = match bias {
            true => self.tensor(&format!("{name}.bias"), &[output], &[output])?,
            // coremltools always writes one.
            false => self.program.repeated(&format!("zeros_{output}"), f16::ZERO, output)?,
        };
        match self.layout {
            Layout::Linear => self.op("linear", name, [("x", x.into()), ("weight", (&weight).into()), ("bias", (&bias).into())]),
            Layout::SplitEinsum => self.conv(name, x, &weight, &bias, [1, 1], [0; 4]),
        }
    }

    /// The axis of the channels in the layout's form of tokens.
    fn channel_axis(&self, x: &Var) -> usize {
        match self.layout {
            Layout::Linear => x.shape().len().saturating_sub(1),
            Layout::SplitEinsum => 1,
        }
    }

    /// A constant of fp32 values of `shape`.
    fn floats(&mut self, name: &str, shape: &[u64], values: &Tensor) -> Result<Var> {
        let values = Vec::<f32>::try_from(&values.f_flatten(0, -1)?)?;
        self.program.floats(name, shape, &values)
    }

    fn input(&mut self, name: &str, array: ArrayType) -> Var {
        self.program.input(name, array)
    }
}
