//! The change of one weight by one LoRA file: LoRA, LoCon, DoRA, LoHa, LoKr or a whole difference.
//!
//! The forms follow LyCORIS 3 (arXiv:2309.14859), and DoRA follows peft (arXiv:2402.09353), which
//! diffusers' `fuse_lora` uses.

use std::collections::BTreeMap;

use squeeze_base::error::{Error, Result};
use squeeze_base::safetensors_file::SafetensorsFile;
use squeeze_numerics::device::Placement;
use squeeze_numerics::product::product;
use tch::{Kind, Tensor};

use super::keys::{Piece, Side};
use crate::checkpoint::tensor::read_tensor;

/// The tensors of one module in one file, by their meaning: their names.
pub(super) type Pieces = BTreeMap<Piece, String>;

/// A change of a weight.
#[derive(Debug)]
pub(super) struct Adapter {
    form: Form,
    /// The factor of the form's product: strength * alpha / rank.
    scale: f64,
    /// DoRA's norms.
    norms: Option<Norms>,
}

/// The norms that DoRA gives to the channels of a weight.
#[derive(Debug)]
struct Norms {
    name: String,
    /// The axis of the channels: 0 for the output channels, 1 for the input channels.
    axis: usize,
}

/// How the change is made of tensors, which are named.
#[derive(Debug)]
enum Form {
    /// up down.
    Low(Factors),
    /// (A1 B1) * (A2 B2), element by element.
    Hadamard(Factors, Factors),
    /// The Kronecker product of two matrices.
    Kronecker(Factor, Factor),
    /// The difference itself.
    Whole(String),
}

/// A product of two matrices a [o, r] and b [r, i ..]; with a core [r, r, kh, kw] in Tucker's form.
#[derive(Debug)]
struct Factors {
    a: String,
    b: String,
    core: Option<String>,
    /// Whether a is stored as [r, o], as LyCORIS does in its own forms with a core.
    transposed: bool,
}

/// A factor of a Kronecker product.
#[derive(Debug)]
enum Factor {
    Whole(String),
    Product(Factors),
}

impl Adapter {
    /// The adapter of `pieces` for a weight of `shape`. `strength` is the user's factor.
    ///
    /// # Errors
    /// [`Error::Tensors`] if a piece is missing, surplus, or of a shape that does not fit.
    pub(super) fn new(file: &SafetensorsFile, pieces: &Pieces, shape: &[i64], strength: f64) -> Result<Self> {
        let mut pieces: Pieces = pieces.clone();
        pieces.remove(&Piece::BiasDifference);
        let alpha = pieces.remove(&Piece::Alpha);
        let (magnitude, dora_scale) = (pieces.remove(&Piece::Magnitude), pieces.remove(&Piece::DoraScale));
        let first = pieces.values().chain(&alpha).chain(&magnitude).chain(&dora_scale).next().cloned().unwrap_or_default();
        let wrong = |problem: String| Error::Tensors { path: file.path().to_owned(), problem };
        let form = Form::take(&mut pieces).ok_or_else(|| wrong(format!("`{first}` and the tensors beside it make no LoRA")))?;
        if let Some(name) = pieces.values().next() {
            return Err(wrong(format!("`{name}` does not belong to the LoRA of its module")));
        }
        let size = form.size(file)?;
        let rest: i64 = shape.iter().skip(1).product();
        if shape.first() != Some(&size[0]) || rest != size[1] {
            return Err(wrong(format!("`{first}` makes a change {size:?}, but the weight is {shape:?}")));
        }
        let scale = match (&alpha, form.rank(file)?) {
            (Some(name), Some(rank)) => {
                let alpha = read(file, name)?;
                if alpha.numel() != 1 {
                    return Err(wrong(format!("`{name}` is not one number")));
                }
                strength * alpha.f_view([-1])?.f_double_value(&[0])? / rank as f64
            }
            _ => strength,
        };
        let norms = match (magnitude, dora_scale) {
            (None, None) => None,
            (Some(name), None) => Some(Norms { name, axis: 0 }),
            (None, Some(name)) => {
                let by_input = matches!(entry_shape(file, &name)?[..], [1, inputs, ..] if shape.get(1) == Some(&inputs));
                Some(Norms { name, axis: usize::from(by_input) })
            }
            (Some(one), Some(other)) => return Err(wrong(format!("`{one}` and `{other}` are the same norms"))),
        };
        if let Some(Norms { name, axis }) = &norms {
            let count: i64 = entry_shape(file, name)?.iter().product();
            if shape.get(*axis) != Some(&count) {
                return Err(wrong(format!("`{name}` has {count} norms for a weight {shape:?}")));
            }
        }
        Ok(Adapter { form, scale, norms })
    }

    /// The changed weight; `weight` is fp32 on the CPU.
    ///
    /// # Errors
    /// [`Error::Tensors`] for values that are not finite; [`Error::Read`]; [`Error::Changed`].
    pub(super) fn apply(&self, file: &SafetensorsFile, weight: &Tensor) -> Result<Tensor> {
        let size = weight.size();
        let change = self.form.change(file)?.f_reshape(&size)?.f_mul_scalar(self.scale)?;
        let changed = weight.f_add(&change)?;
        let Some(Norms { name, axis }) = &self.norms else { return Ok(changed) };
        let others: Vec<i64> = (0..size.len()).filter(|other| other != axis).map(|other| other as i64).collect();
        let squares = changed.f_to_kind(Kind::Double)?.f_square()?;
        let norms = squares.f_sum_dim_intlist(others.as_slice(), true, Kind::Double)?.f_sqrt()?;
        let magnitude = read(file, name)?.f_to_kind(Kind::Double)?.f_reshape(norms.size())?;
        Ok(changed.f_mul(&magnitude.f_div(&norms)?.f_to_kind(Kind::Float)?)?)
    }
}

impl Form {
    /// Takes the tensors of a form out of `pieces`; `None` if they make none.
    fn take(pieces: &mut Pieces) -> Option<Form> {
        if let Some(difference) = pieces.remove(&Piece::Difference) {
            return Some(Form::Whole(difference));
        }
        if let Some(a) = pieces.remove(&Piece::Up) {
            let core = pieces.remove(&Piece::Mid);
            return Some(Form::Low(Factors { a, b: pieces.remove(&Piece::Down)?, core, transposed: false }));
        }
        let mut hadamard = |side| {
            let (a, b) = (pieces.remove(&Piece::Hada(side, true))?, pieces.remove(&Piece::Hada(side, false))?);
            let core = pieces.remove(&Piece::HadaCore(side));
            Some(Factors { a, b, transposed: core.is_some(), core })
        };
        if let Some(first) = hadamard(Side::First) {
            return Some(Form::Hadamard(first, hadamard(Side::Second)?));
        }
        let mut factor = |side| {
            if let Some(whole) = pieces.remove(&Piece::Kron(side)) {
                return Some(Factor::Whole(whole));
            }
            let (a, b) = (pieces.remove(&Piece::KronProduct(side, true))?, pieces.remove(&Piece::KronProduct(side, false))?);
            let core = if side == Side::Second { pieces.remove(&Piece::KronCore) } else { None };
            Some(Factor::Product(Factors { a, b, transposed: core.is_some(), core }))
        };
        Some(Form::Kronecker(factor(Side::First)?, factor(Side::Second)?))
    }

    /// The rank by which alpha is divided; `None` for forms without one, which ignore alpha.
    fn rank(&self, file: &SafetensorsFile) -> Result<Option<i64>> {
        let of = |factors: &Factors| Ok(Some(entry_shape(file, &factors.b)?[0]));
        match self {
            Form::Low(factors) | Form::Hadamard(factors, _) => of(factors),
            Form::Kronecker(Factor::Product(factors), _) | Form::Kronecker(Factor::Whole(_), Factor::Product(factors)) => {
                of(factors)
            }
            Form::Kronecker(Factor::Whole(_), Factor::Whole(_)) | Form::Whole(_) => Ok(None),
        }
    }

    /// The size of the change as a matrix, [o, i * kh * kw], from the file's header.
    fn size(&self, file: &SafetensorsFile) -> Result<[i64; 2]> {
        match self {
            Form::Whole(name) => matrix_size(file, name),
            Form::Low(factors) => factors.size(file),
            Form::Hadamard(first, second) => {
                let (one, two) = (first.size(file)?, second.size(file)?);
                if one != two {
                    let problem = format!("`{}` and `{}` make products {one:?} and {two:?}", first.a, second.a);
                    return Err(Error::Tensors { path: file.path().to_owned(), problem });
                }
                Ok(one)
            }
            Form::Kronecker(first, second) => {
                let ([a, b], [c, d]) = (first.size(file)?, second.size(file)?);
                let product = |x: i64, y: i64| {
                    let problem = format!("a Kronecker product {a} * {c} by {b} * {d} is too large");
                    x.checked_mul(y).ok_or_else(|| Error::Tensors { path: file.path().to_owned(), problem })
                };
                Ok([product(a, c)?, product(b, d)?])
            }
        }
    }

    /// The change as fp32, in the order of the weight's elements.
    fn change(&self, file: &SafetensorsFile) -> Result<Tensor> {
        match self {
            Form::Whole(name) => read(file, name),
            Form::Low(factors) => factors.product(file),
            Form::Hadamard(first, second) => Ok(first.product(file)?.f_mul(&second.product(file)?)?),
            Form::Kronecker(first, second) => {
                let (first, second) = (first.matrix(file)?, second.matrix(file)?);
                Ok(first.f_kron(&second)?)
            }
        }
    }
}

impl Factor {
    fn size(&self, file: &SafetensorsFile) -> Result<[i64; 2]> {
        match self {
            Factor::Whole(name) => matrix_size(file, name),
            Factor::Product(factors) => factors.size(file),
        }
    }

    /// The factor as a matrix [o, i * kh * kw]. The Kronecker product of matrices has its elements
    /// in the order of that of the kernels, because the first factor has no kernel.
    fn matrix(&self, file: &SafetensorsFile) -> Result<Tensor> {
        let [rows, columns] = self.size(file)?;
        let tensor = match self {
            Factor::Whole(name) => read(file, name)?,
            Factor::Product(factors) => factors.product(file)?,
        };
        Ok(tensor.f_reshape([rows, columns])?)
    }
}

impl Factors {
    /// The size of the product as a matrix, from the file's header.
    fn size(&self, file: &SafetensorsFile) -> Result<[i64; 2]> {
        let wrong = |problem: String| Error::Tensors { path: file.path().to_owned(), problem };
        let (a, b) = (matrix_size(file, &self.a)?, matrix_size(file, &self.b)?);
        let [outputs, rank] = if self.transposed { [a[1], a[0]] } else { a };
        let [b_rank, inputs] = b;
        let fits = match &self.core {
            None => rank == b_rank,
            Some(core) => matches!(entry_shape(file, core)?[..], [first, second, _, _] if first == rank && second == b_rank),
        };
        if !fits || rank < 1 {
            return Err(wrong(format!("`{}` {a:?} and `{}` {b:?} have no product", self.a, self.b)));
        }
        let kernel: i64 = match &self.core {
            None => 1,
            Some(core) => entry_shape(file, core)?[2..].iter().product(),
        };
        let columns =
            inputs.checked_mul(kernel).ok_or_else(|| wrong(format!("`{}` makes a kernel that is too large", self.b)))?;
        Ok([outputs, columns])
    }

    /// The product in the order of the weight's elements.
    fn product(&self, file: &SafetensorsFile) -> Result<Tensor> {
        let (a, b) = (matrix(file, &self.a)?, matrix(file, &self.b)?);
        let a = if self.transposed { a.f_transpose(0, 1)?.f_contiguous()? } else { a };
        let Some(core) = &self.core else { return product(&a, &b) };
        // Sum over p and q of a[o, p] core[p, q, k] b[q, i].
        let core = read(file, core)?;
        let (p, q, kernel) = (core.size()[0], core.size()[1], core.size()[2] * core.size()[3]);
        let (outputs, inputs) = (a.size()[0], b.size()[1]);
        let left = product(&a, &core.f_reshape([p, q * kernel])?)?;
        let left = left.f_view([outputs, q, kernel])?.f_permute([0, 2, 1])?.f_reshape([outputs * kernel, q])?;
        let both = product(&left, &b)?.f_view([outputs, kernel, inputs])?;
        Ok(both.f_permute([0, 2, 1])?.f_contiguous()?)
    }
}

/// The shape of a tensor, which has at least one dimension.
fn entry_shape(file: &SafetensorsFile, name: &str) -> Result<Vec<i64>> {
    let shape = file.entries().get(name).map(|entry| entry.shape.clone()).unwrap_or_default();
    if shape.is_empty() || shape.contains(&0) {
        let problem = format!("`{name}` is of shape {shape:?}");
        return Err(Error::Tensors { path: file.path().to_owned(), problem });
    }
    Ok(shape)
}

/// A tensor's size as a matrix: all dimensions but the first together are the columns.
fn matrix_size(file: &SafetensorsFile, name: &str) -> Result<[i64; 2]> {
    let shape = entry_shape(file, name)?;
    Ok([shape[0], shape[1..].iter().product()])
}

fn matrix(file: &SafetensorsFile, name: &str) -> Result<Tensor> {
    let size = matrix_size(file, name)?;
    Ok(read(file, name)?.f_reshape(size)?)
}

/// A tensor as fp32 on the CPU.
fn read(file: &SafetensorsFile, name: &str) -> Result<Tensor> {
    read_tensor(file, name, Placement::CPU)
}
