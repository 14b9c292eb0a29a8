//! Threads, one for each device.

use squeeze_base::error::Result;

/// Calls `run` with the place and the item of every device, each in a thread of its own where there
/// are several.
///
/// # Errors
/// The first one in the order of the devices, after all threads have ended.
pub(super) fn on_each<S: Send, T: Send>(items: &mut [S], run: &(dyn Fn(usize, &mut S) -> Result<T> + Sync)) -> Result<Vec<T>> {
    let Some((first, others)) = items.split_first_mut() else { return Ok(Vec::new()) };
    std::thread::scope(|scope| {
        let others = others.iter_mut().zip(1..);
        let threads: Vec<_> = others.map(|(item, device)| scope.spawn(move || run(device, item))).collect();
        let mut results = vec![run(0, first)?];
        for thread in threads {
            results.push(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(results)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use squeeze_base::error::Error;

    use super::on_each;

    #[test]
    fn the_first_error_is_reported_after_all_threads_have_ended() {
        for failing in [&[][..], &[0], &[1, 2], &[0, 3], &[3]] {
            let ended = AtomicUsize::new(0);
            let result = on_each(&mut [10, 11, 12, 13], &|device, item| {
                // Later devices fail sooner.
                std::thread::sleep(std::time::Duration::from_millis(20 - 5 * device as u64));
                ended.fetch_add(1, Ordering::SeqCst);
                if failing.contains(&device) { Err(Error::Failed(format!("{device}"))) } else { Ok(*item + 1) }
            });
            assert_eq!(ended.load(Ordering::SeqCst), 4, "{failing:?}");
            match (result, failing.first()) {
                (Ok(results), None) => assert_eq!(results, [11, 12, 13, 14]),
                (Err(Error::Failed(why)), Some(first)) => assert_eq!(why, first.to_string()),
                (result, _) => panic!("{failing:?}: {result:?}"),
            }
        }
    }

    #[test]
    fn no_devices_have_no_results() {
        assert_eq!(on_each(&mut [0; 0], &|device, _| Ok(device)).unwrap(), [0; 0]);
    }
}
