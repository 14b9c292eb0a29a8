//! Element types and the types of arrays.

use std::fmt::{self, Display};

use squeeze_codebook::BitWidth;

use super::proto::mil_spec::dimension::ConstantDimension;
use super::proto::mil_spec::{DataType, Dimension, TensorType, ValueType, dimension, value_type};

/// The type of an array's elements: those types that a UNet's program needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Element {
    /// True or false.
    Bool,
    /// Text.
    Text,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// 32-bit integer.
    I32,
    /// Unsigned numbers: masks and palette indices.
    Unsigned(BitWidth),
}

impl Element {
    /// The element type of masks: numbers of one bit.
    pub const BIT: Element = Element::Unsigned(BitWidth::One);

    /// All elements.
    pub(super) fn all() -> impl Iterator<Item = Element> {
        let dense = [Element::Bool, Element::Text, Element::F16, Element::F32, Element::I32];
        dense.into_iter().chain(BitWidth::ALL.map(Element::Unsigned))
    }

    /// The number that stands for it in the program (`MILSpec.DataType`).
    pub(super) fn code(self) -> i32 {
        let code = match self {
            Element::Bool => DataType::Bool,
            Element::Text => DataType::String,
            Element::F16 => DataType::Float16,
            Element::F32 => DataType::Float32,
            Element::I32 => DataType::Int32,
            Element::Unsigned(BitWidth::One) => DataType::Uint1,
            Element::Unsigned(BitWidth::Two) => DataType::Uint2,
            Element::Unsigned(BitWidth::Three) => DataType::Uint3,
            Element::Unsigned(BitWidth::Four) => DataType::Uint4,
            Element::Unsigned(BitWidth::Six) => DataType::Uint6,
            Element::Unsigned(BitWidth::Eight) => DataType::Uint8,
        };
        code as i32
    }

    /// The element of a number in a program.
    pub(super) fn of_code(code: i32) -> Option<Self> {
        Element::all().find(|element| element.code() == code)
    }

    /// The number that stands for it in the blob file, which is another one
    /// (`mlmodel/src/MILBlob/Blob/BlobDataType.hpp`). Text and bools are never there.
    pub(super) fn blob_code(self) -> Option<u32> {
        Some(match self {
            Element::Bool | Element::Text => return None,
            Element::F16 => 1,
            Element::F32 => 2,
            Element::I32 => 14,
            Element::Unsigned(BitWidth::One) => 9,
            Element::Unsigned(BitWidth::Two) => 10,
            Element::Unsigned(BitWidth::Three) => 12,
            Element::Unsigned(BitWidth::Four) => 11,
            Element::Unsigned(BitWidth::Six) => 13,
            Element::Unsigned(BitWidth::Eight) => 3,
        })
    }

    /// Bits of one element in the blob file.
    pub(super) fn bits(self) -> u64 {
        match self {
            Element::Bool | Element::Text => 8,
            Element::F16 => 16,
            Element::F32 | Element::I32 => 32,
            Element::Unsigned(bits) => u64::from(bits.bits()),
        }
    }
}

impl Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Element::Bool => f.write_str("bool"),
            Element::Text => f.write_str("string"),
            Element::F16 => f.write_str("fp16"),
            Element::F32 => f.write_str("fp32"),
            Element::I32 => f.write_str("int32"),
            Element::Unsigned(bits) => write!(f, "uint{bits}"),
        }
    }
}

/// Dimensions of an array: a look-up table for a convolution's weight has six.
pub(super) const MAX_RANK: usize = 8;

/// An array's type. A scalar has no dimensions.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ArrayType {
    /// The type of its elements.
    pub element: Element,
    /// Its shape.
    pub shape: Vec<u64>,
}

impl ArrayType {
    /// An array of `element` of `shape`.
    pub fn new(element: Element, shape: impl Into<Vec<u64>>) -> Self {
        ArrayType { element, shape: shape.into() }
    }

    /// The number of elements; `None` if it is beyond 64 bits.
    #[must_use]
    pub fn numel(&self) -> Option<u64> {
        self.shape.iter().try_fold(1u64, |product, n| product.checked_mul(*n))
    }

    /// The bytes of its elements, packed without gaps.
    pub(super) fn bytes(&self) -> Option<u64> {
        Some(self.numel()?.checked_mul(self.element.bits())?.div_ceil(8))
    }

    /// Its form in a program.
    pub(super) fn to_proto(&self) -> ValueType {
        let dimension =
            |size: &u64| Dimension { dimension: Some(dimension::Dimension::Constant(ConstantDimension { size: *size })) };
        ValueType {
            r#type: Some(value_type::Type::TensorType(TensorType {
                data_type: self.element.code(),
                rank: self.shape.len() as i64,
                dimensions: self.shape.iter().map(dimension).collect(),
                attributes: Default::default(),
            })),
        }
    }

    /// Takes it from a program.
    pub(super) fn of_proto(value: Option<&ValueType>) -> Result<Self, String> {
        let Some(value_type::Type::TensorType(tensor)) = value.and_then(|value| value.r#type.as_ref()) else {
            return Err("is not an array".into());
        };
        let element = Element::of_code(tensor.data_type).ok_or_else(|| format!("has the unknown dtype {}", tensor.data_type))?;
        let size = |dimension: &Dimension| match dimension.dimension {
            Some(dimension::Dimension::Constant(ConstantDimension { size })) if size > 0 => Ok(size),
            _ => Err("has a dimension that is not a positive number".to_owned()),
        };
        let shape = tensor.dimensions.iter().map(size).collect::<Result<Vec<u64>, _>>()?;
        if tensor.rank != shape.len() as i64 || shape.len() > MAX_RANK {
            return Err(format!("is of rank {} with {} dimensions", tensor.rank, shape.len()));
        }
        if !tensor.attributes.is_empty() {
            return Err("has attributes on its type".into());
        }
        Ok(ArrayType { element, shape })
    }
}

impl Display for ArrayType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.element, self.shape)
    }
}
