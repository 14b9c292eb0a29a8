//! libtorch on one thread, for gradients.

/// Keeps libtorch on one thread until it is dropped, because gradients of SiLU, and of products
/// with few rows, depend on the number of threads.
#[derive(Debug)]
#[must_use = "libtorch returns to its threads when this is dropped"]
pub struct OneThread(i32);

impl OneThread {
    /// One thread from now on.
    pub fn begin() -> Self {
        let threads = tch::get_num_threads();
        tch::set_num_threads(1);
        OneThread(threads)
    }
}

impl Drop for OneThread {
    fn drop(&mut self) {
        tch::set_num_threads(self.0);
    }
}
