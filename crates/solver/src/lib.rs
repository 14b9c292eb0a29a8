//! SparseGPT, exact palettes and the joint solver, on matrices. See [`solver`].

pub mod solver;
