//! How much memory this process has.
//!
//! Resident memory counts what lies in RAM, memory-mapped weights included: it is the figure that decides whether a run
//! fits on a machine.

/// Resident memory in bytes, now. `None` where the system does not say.
pub fn resident_bytes() -> Option<u64> {
    system::resident_bytes()
}

/// The most resident memory so far, in bytes. `None` where the system does not say.
pub fn peak_bytes() -> Option<u64> {
    system::peak_bytes()
}

/// Memory that can still be used without swapping, in bytes, within the limits of a container and of `ulimit -v`. `None` where the
/// system does not say.
pub fn available_bytes() -> Option<u64> {
    system::available_bytes()
}

/// Starts the peak anew at what is resident now, and says whether the system can do that.
///
/// For several measurements in one process; where it is not possible, only the first means anything.
pub fn reset_peak() -> bool {
    system::reset_peak()
}

#[cfg(target_os = "linux")]
mod system {
    use std::fs;

    pub(super) fn resident_bytes() -> Option<u64> {
        status_field("VmRSS:")
    }

    // Not `getrusage`: after fork and exec its maximum is at least that of the parent, such as a large Python process.
    pub(super) fn peak_bytes() -> Option<u64> {
        status_field("VmHWM:")
    }

    pub(super) fn reset_peak() -> bool {
        fs::write("/proc/self/clear_refs", "5").is_ok()
    }

    pub(super) fn available_bytes() -> Option<u64> {
        let free = field("/proc/meminfo", "MemAvailable:")?;
        let number = |file: &str| -> Option<u64> {
            let text = fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?;
            text.trim().parse().ok()
        };
        // "max" is no number: no limit.
        let group = number("memory.max")
            .map(|limit| limit.saturating_sub(number("memory.current").unwrap_or(0)));
        [group, free_address_space()]
            .into_iter()
            .flatten()
            .chain([free])
            .min()
    }

    /// What `ulimit -v` leaves to this process.
    fn free_address_space() -> Option<u64> {
        let limits = fs::read_to_string("/proc/self/limits").ok()?;
        let line = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max address space"))?;
        // "unlimited" is no number: no limit.
        let limit: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some(limit.saturating_sub(status_field("VmSize:")?))
    }

    fn status_field(name: &str) -> Option<u64> {
        field("/proc/self/status", name)
    }

    fn field(file: &str, name: &str) -> Option<u64> {
        let status = fs::read_to_string(file).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kibibytes * 1024)
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::sync::atomic::{AtomicU64, Ordering};

    /// The most that was seen on being asked.
    static SEEN: AtomicU64 = AtomicU64::new(0);

    pub(super) fn resident_bytes() -> Option<u64> {
        let resident = memory_stats::memory_stats()?.physical_mem as u64;
        SEEN.fetch_max(resident, Ordering::Relaxed);
        Some(resident)
    }

    pub(super) fn peak_bytes() -> Option<u64> {
        resident_bytes()?;
        let seen = SEEN.load(Ordering::Relaxed);
        Some(seen.max(system_peak().unwrap_or(0)))
    }

    pub(super) fn reset_peak() -> bool {
        false
    }

    pub(super) fn available_bytes() -> Option<u64> {
        None
    }

    #[cfg(unix)]
    fn system_peak() -> Option<u64> {
        use nix::sys::resource::{UsageWho, getrusage};
        let maximum = u64::try_from(getrusage(UsageWho::RUSAGE_SELF).ok()?.max_rss()).ok()?;
        // Bytes on Apple systems, KiB elsewhere.
        Some(if cfg!(target_vendor = "apple") {
            maximum
        } else {
            maximum * 1024
        })
    }

    #[cfg(not(unix))]
    fn system_peak() -> Option<u64> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_remembers_memory_that_was_given_back() {
        const SIZE: usize = 64 << 20;
        let before = resident_bytes().expect("this system says");
        let block = vec![1_u8; SIZE];
        assert_eq!(std::hint::black_box(&block)[SIZE - 1], 1);
        let during = resident_bytes().expect("this system says");
        drop(block);
        let peak = peak_bytes().expect("this system says");
        // Other tests run in the same process, so only coarse bounds hold.
        assert!(
            peak >= during.min(before + SIZE as u64 / 2),
            "{before} {during} {peak}"
        );
        assert!(peak >= SIZE as u64, "{peak}");
    }
}
