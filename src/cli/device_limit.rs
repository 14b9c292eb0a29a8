//! The limit of libtorch's memory on a GPU.

use sdxl_squeeze::device::total_memory;
use sdxl_squeeze::number;
use sdxl_squeeze::plan::CUDA_CONTEXT;
use tch::Device;

/// The variables of libtorch's allocator, of which the first that is set counts.
const VARIABLES: [&str; 2] = ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"];

/// Keeps the memory of this process on the GPU `device` within `budget` bytes: libtorch's allocator
/// gives blocks that it keeps for later back before it takes more than its share of the budget, and
/// fails then. The allocator reads its settings when the first tensor comes to a GPU, so this has
/// to be called before.
pub(super) fn set(device: Device, budget: u64) {
    if let Some(name) = VARIABLES.iter().find(|name| std::env::var_os(name).is_some()) {
        tracing::warn!("{name} is set, so the memory budget is planned with and not enforced on the GPU");
        return;
    }
    let Some(total) = total_memory(device) else {
        tracing::warn!("the memory of {device:?} is unknown, so the budget is planned with and not enforced");
        return;
    };
    if let Some(settings) = settings(budget, total) {
        tracing::debug!("{}={settings}, for {} of {}", VARIABLES[0], number::size(budget), number::size(total));
        // SAFETY: no other thread of this process reads or writes the environment now. The command
        // line calls this before it opens a model or starts a thread that computes; CUDA's own
        // threads and the one that draws progress bars leave the environment alone.
        unsafe { std::env::set_var(VARIABLES[0], settings) };
    }
}

/// libtorch's settings for a budget on a GPU with `total` bytes; `None` where the budget is no
/// limit. With expandable segments, blocks of one size are not lost for those of another.
fn settings(budget: u64, total: u64) -> Option<String> {
    let share = budget.saturating_sub(CUDA_CONTEXT) as f64 / total as f64;
    (share < 1.0).then(|| format!("per_process_memory_fraction:{share:.6},expandable_segments:True"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorchs_share_of_a_budget_is_without_cudas_context() {
        let (budget, total) = (8 << 30, 80 << 30);
        let settings = settings(budget, total).unwrap();
        let (share, rest) = settings.strip_prefix("per_process_memory_fraction:").unwrap().split_once(',').unwrap();
        let share: f64 = share.parse().unwrap();
        let bytes = share * total as f64 + CUDA_CONTEXT as f64;
        assert!(bytes <= budget as f64 + total as f64 * 1e-6 && bytes > 0.999 * budget as f64, "{share}");
        assert_eq!(rest, "expandable_segments:True");
        // More than there is is no limit, and less than the context is nothing.
        assert_eq!(super::settings(81 << 30, total), None);
        assert!(super::settings(1 << 20, total).unwrap().starts_with("per_process_memory_fraction:0.000000,"));
    }
}
