//! Numbers as people read them.

use indicatif::{HumanBytes, HumanCount};
use std::time::Duration;

/// Memory and file sizes: `512 B`, `1.46 KiB`, `3.20 GiB`.
pub fn bytes(bytes: u64) -> String {
    HumanBytes(bytes).to_string()
}

/// Exactly: `1,234,567`.
pub fn whole(count: u64) -> String {
    HumanCount(count).to_string()
}

/// In three or four digits: `9,999`, `12.3 k`, `1.23 M`, `7.62 B`, `1.50 T`.
pub fn count(count: u64) -> String {
    const FIRST_ROUNDED: u64 = 10_000;
    if count < FIRST_ROUNDED {
        return whole(count);
    }
    let mut value = count as f64 / 1e3;
    for unit in ["k", "M", "B"] {
        // 999.5 would be shown as 1000 of this unit.
        if value < 999.5 {
            return format!("{} {unit}", three_digits(value));
        }
        value /= 1e3;
    }
    format!("{} T", three_digits(value))
}

/// Seconds as a time; what is no time is none or the longest.
pub fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}

/// Time that something takes: `0.25 s`, `42 s`, `3 min 07 s`, `2 h 05 min`, `3 d 04 h`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 9.95 {
        return format!("{} s", three_digits(seconds));
    }
    let seconds = seconds.round() as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match () {
        () if minutes == 0 => format!("{seconds} s"),
        () if hours == 0 => format!("{minutes} min {:02} s", seconds % 60),
        () if days == 0 => format!("{hours} h {:02} min", minutes % 60),
        () => format!("{days} d {:02} h", hours % 24),
    }
}

fn three_digits(value: f64) -> String {
    match value {
        ..9.995 => format!("{value:.2}"),
        ..99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        for (number, text) in [
            (0, "0"),
            (9_999, "9,999"),
            (10_000, "10.0 k"),
            (99_949, "99.9 k"),
            (99_950, "100 k"),
            (999_499, "999 k"),
            (999_500, "1.00 M"),
            (1_234_567, "1.23 M"),
            (494_032_768, "494 M"),
            (7_615_616_512, "7.62 B"),
            (1_500_000_000_000, "1.50 T"),
            (u64::MAX, "18446744 T"),
        ] {
            assert_eq!(count(number), text);
        }
        assert_eq!(whole(1_234_567), "1,234,567");
    }

    #[test]
    fn sizes() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(3 << 29), "1.50 GiB");
    }

    #[test]
    fn durations() {
        for (milliseconds, text) in [
            (0, "0.00 s"),
            (250, "0.25 s"),
            (9_940, "9.94 s"),
            (9_960, "10 s"),
            (59_400, "59 s"),
            (59_600, "1 min 00 s"),
            (187_000, "3 min 07 s"),
            (7_500_000, "2 h 05 min"),
            (273_600_000, "3 d 04 h"),
        ] {
            assert_eq!(duration(Duration::from_millis(milliseconds)), text);
        }
    }
}
