//! Tensors of a network as views of stored ones.

/// A tensor of a network, as a view of a stored tensor: all of it or some of its rows, as they are
/// or transposed. What a view shows is read from the file; nothing is converted on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The network's name for the tensor.
    pub name: String,
    /// The part `i` of `n` equal parts along the first dimension, as (i, n); `None` is the whole.
    pub part: Option<(usize, usize)>,
    /// Whether the stored matrix is the transpose of the network's.
    pub transposed: bool,
}

impl View {
    /// The whole of a stored tensor, under the network's name for it.
    pub fn whole(name: impl Into<String>) -> Self {
        View { name: name.into(), part: None, transposed: false }
    }

    /// The transpose of a stored matrix.
    pub fn transposed(name: impl Into<String>) -> Self {
        View { transposed: true, ..View::whole(name) }
    }

    /// The part `index` of `parts` equal parts along the first dimension of a stored tensor.
    pub fn part(name: impl Into<String>, index: usize, parts: usize) -> Self {
        View { part: Some((index, parts)), ..View::whole(name) }
    }
}
