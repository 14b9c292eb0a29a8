//! An allocator that refuses allocations beyond 2 GiB. The fuzzer checks its own limit of memory
//! only once a second, and counts only pages that were touched.

use std::alloc::{GlobalAlloc, Layout, System};

const MOST: usize = 2 << 30;

struct Limited;

#[global_allocator]
static ALLOCATOR: Limited = Limited;

// SAFETY: every call is passed to the system's allocator unchanged, or returns null, by which an
// allocator reports that there is no memory.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > MOST {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller makes the guarantees that the system's allocator requires.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() > MOST {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller makes the guarantees that the system's allocator requires.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if size > MOST {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller makes the guarantees that the system's allocator requires.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller makes the guarantees that the system's allocator requires.
        unsafe { System.dealloc(pointer, layout) }
    }
}
