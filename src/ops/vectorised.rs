//! One function body, compiled for each vector width, chosen when it is called.

/// Which instructions the machine has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Width {
    /// x86-64 with AVX-512.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// x86-64 with AVX2 and fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What the target is compiled for.
    Portable,
}

/// The widest vectors of this machine. The answers are cached by the standard library.
pub(super) fn width() -> Width {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("fma")
        {
            return Width::Avx512;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Width::Avx2;
        }
    }
    Width::Portable
}

/// Compiles a plain function for AVX-512, for AVX2 with FMA and for the target's baseline, and calls the widest.
///
/// The compiler vectorises the loops of the body, which may also use `V`, the [`Lanes`](super::lanes::Lanes) of that
/// width. Every version does the same arithmetic in the same order, so they agree to the bit. A machine without fused
/// multiply-add computes it in software, slowly.
macro_rules! vectorised {
    ($(
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block
    )*) => {$(
        $(#[$attribute])*
        $visibility fn $name($($argument: $type),*) $(-> $result)? {
            #[allow(clippy::too_many_arguments, reason = "repeats the signature it is generated from")]
            #[allow(clippy::extra_unused_type_parameters, reason = "plain loops need no `V`")]
            #[inline(always)]
            fn body<V: $crate::ops::lanes::Lanes>($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[allow(clippy::too_many_arguments, reason = "repeats the signature it is generated from")]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
            fn avx512($($argument: $type),*) $(-> $result)? {
                body::<$crate::ops::lanes::Avx512>($($argument),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[allow(clippy::too_many_arguments, reason = "repeats the signature it is generated from")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($argument: $type),*) $(-> $result)? {
                body::<$crate::ops::lanes::Avx2>($($argument),*)
            }

            #[allow(unsafe_code, reason = "functions for more instructions than the target's baseline")]
            match $crate::ops::vectorised::width() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `width` has found these instructions on this machine.
                $crate::ops::vectorised::Width::Avx512 => unsafe { avx512($($argument),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::ops::vectorised::Width::Avx2 => unsafe { avx2($($argument),*) },
                $crate::ops::vectorised::Width::Portable => {
                    body::<$crate::ops::lanes::Portable>($($argument),*)
                }
            }
        }
    )*};
}

pub(super) use vectorised;
