//! Layers that are solved beside one another: several on a GPU, which one layer alone leaves idle
//! while the host works for it, and as many as there are devices.

use std::collections::VecDeque;
use std::thread::{Scope, ScopedJoinHandle};

use squeeze_base::error::Result;
use squeeze_solver::ready_for_threads;
use tch::Device;

use super::problem::{Problem, Solved};

/// Threads that solve on a GPU at once: while one waits for the GPU's numbers or packs, the others
/// have work for it.
const ON_A_GPU: usize = 6;

/// The devices that solve, and how many layers each may have at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Team<'a> {
    /// At least one.
    pub devices: &'a [Device],
    /// Bytes on each device for the layers beside the first.
    pub spare_bytes: u64,
}

/// A layer that is being solved.
struct UnderWay<'scope> {
    thread: ScopedJoinHandle<'scope, Result<Solved>>,
    place: usize,
    bytes: u64,
}

impl Team<'_> {
    /// Solves `problems` and gives the results to `done` in the same order. The results do not
    /// depend on the team.
    ///
    /// # Errors
    /// The first error in the order of the problems: of a problem, of solving it, or of `done`.
    /// Layers that come before it are done, and no thread is left.
    pub(super) fn solve<'a>(
        self,
        problems: &mut dyn Iterator<Item = Result<Problem<'a>>>,
        done: &mut dyn FnMut(Solved) -> Result<()>,
    ) -> Result<()> {
        if self.devices.len() == 1 && self.devices[0] == Device::Cpu {
            for problem in problems {
                done(problem?.solve(Device::Cpu)?)?;
            }
            return Ok(());
        }
        self.devices.iter().try_for_each(|device| ready_for_threads(*device))?;
        std::thread::scope(|scope| {
            let mut under_way = VecDeque::new();
            let mut failed = None;
            for problem in problems {
                let problem = match problem {
                    Ok(problem) => problem,
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                };
                while !self.has_room(&under_way, &problem) {
                    end_first(&mut under_way, done)?;
                }
                under_way.push_back(self.begin(scope, problem));
            }
            while !under_way.is_empty() {
                end_first(&mut under_way, done)?;
            }
            failed.map_or(Ok(()), Err)
        })
    }

    /// The place of the device for the problem `number` among `count` inputs, of which this one has
    /// its Hessian on `device`: that device, or where there are few inputs or one device is named
    /// several times, each in turn.
    pub(super) fn place(&self, device: Device, number: usize, count: usize) -> usize {
        let mut places = self.devices.iter().enumerate().filter(|(_, own)| **own == device);
        match (places.next(), places.next()) {
            (Some((place, _)), None) if count >= self.devices.len() => place,
            _ => number % self.devices.len(),
        }
    }

    fn has_room(&self, under_way: &VecDeque<UnderWay<'_>>, problem: &Problem<'_>) -> bool {
        let on_device = under_way.iter().filter(|other| other.place == problem.place);
        let most = if matches!(self.devices[problem.place], Device::Cuda(_)) { ON_A_GPU } else { 1 };
        let bytes: u64 = on_device.clone().map(|other| other.bytes).sum();
        match on_device.count() {
            0 => true,
            count => count < most && bytes.saturating_add(problem.bytes) <= self.spare_bytes,
        }
    }

    fn begin<'scope, 'a: 'scope>(&self, scope: &'scope Scope<'scope, '_>, problem: Problem<'a>) -> UnderWay<'scope> {
        let (place, bytes) = (problem.place, problem.bytes);
        let device = self.devices[place];
        UnderWay { thread: scope.spawn(move || problem.solve(device)), place, bytes }
    }
}

/// Waits for the first layer under way.
fn end_first(under_way: &mut VecDeque<UnderWay<'_>>, done: &mut dyn FnMut(Solved) -> Result<()>) -> Result<()> {
    let Some(first) = under_way.pop_front() else { return Ok(()) };
    let waiting = tracing::debug_span!("wait for layers").entered();
    let solved = first.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    drop(waiting);
    done(solved)
}
