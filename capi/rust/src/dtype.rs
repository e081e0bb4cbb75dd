//! Data types, and which Rust types hold their elements.

use std::fmt;

use crate::error::{Error, Result, Status};
use crate::ffi;

macro_rules! types {
    ($($(#[$doc:meta])* $variant:ident = $constant:ident, $name:literal, $bits:literal;)*) => {
        /// What a tensor's elements are. The numbers 0 to 9 are WebNN's.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum DType {
            $($(#[$doc])* $variant,)*
        }

        impl DType {
            /// Every type.
            pub const ALL: &'static [DType] = &[$(DType::$variant),*];

            /// Of the library's number.
            pub fn from_raw(raw: i32) -> Result<DType> {
                match raw {
                    $(ffi::$constant => Ok(DType::$variant),)*
                    other => Err(Error::new(Status::Unsupported, format!("this crate does not know data type {other}"))),
                }
            }

            /// The library's number.
            pub fn raw(self) -> i32 {
                match self {
                    $(DType::$variant => ffi::$constant,)*
                }
            }

            /// `"float32"`, say.
            pub fn name(self) -> &'static str {
                match self {
                    $(DType::$variant => $name,)*
                }
            }

            /// Bits of one element.
            pub fn bits(self) -> usize {
                match self {
                    $(DType::$variant => $bits,)*
                }
            }
        }
    };
}

types! {
    /// [`f32`].
    Float32 = TRTXPY_FLOAT32, "float32", 32;
    /// [`F16`].
    Float16 = TRTXPY_FLOAT16, "float16", 16;
    /// [`i32`].
    Int32 = TRTXPY_INT32, "int32", 32;
    /// [`u32`].
    UInt32 = TRTXPY_UINT32, "uint32", 32;
    /// [`i64`].
    Int64 = TRTXPY_INT64, "int64", 64;
    /// [`u64`].
    UInt64 = TRTXPY_UINT64, "uint64", 64;
    /// [`i8`].
    Int8 = TRTXPY_INT8, "int8", 8;
    /// [`u8`].
    UInt8 = TRTXPY_UINT8, "uint8", 8;
    /// Two to a byte, the first in the low half: bytes only.
    Int4 = TRTXPY_INT4, "int4", 4;
    /// Two to a byte, the first in the low half: bytes only.
    UInt4 = TRTXPY_UINT4, "uint4", 4;
    /// [`Bool`].
    Bool = TRTXPY_BOOL, "bool", 8;
    /// [`BF16`].
    BFloat16 = TRTXPY_BFLOAT16, "bfloat16", 16;
    /// [`F8`].
    Float8 = TRTXPY_FLOAT8, "float8", 8;
}

impl DType {
    /// Bytes of so many elements, packed; `None` if that is more than can be.
    pub fn bytes(self, elements: usize) -> Option<usize> {
        if self.bits() == 4 {
            return Some(elements / 2 + elements % 2);
        }
        elements.checked_mul(self.bits() / 8).filter(|bytes| *bytes <= isize::MAX as usize)
    }

    /// The elements of a tensor's bytes as `f32`: exact for floats of up to 32 bits and integers up to 2^24, else rounded.
    ///
    /// `elements`: how many there are, which the bytes of 4-bit types do not say. Returns `None` if the bytes are not
    /// those of so many elements.
    pub fn to_f32(self, bytes: &[u8], elements: usize) -> Option<Vec<f32>> {
        if self.bytes(elements)? != bytes.len() {
            return None;
        }
        fn wide<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f32) -> Vec<f32> {
            bytes.chunks_exact(N).map(|chunk| convert(chunk.try_into().expect("N bytes"))).collect()
        }
        let half = |index: usize| bytes[index / 2] >> (4 * (index % 2)) & 15;
        Some(match self {
            DType::Float32 => wide(bytes, f32::from_ne_bytes),
            DType::Float16 => wide(bytes, |each| F16(u16::from_ne_bytes(each)).to_f32()),
            DType::BFloat16 => wide(bytes, |each| BF16(u16::from_ne_bytes(each)).to_f32()),
            DType::Float8 => bytes.iter().map(|each| F8(*each).to_f32()).collect(),
            DType::Int32 => wide(bytes, |each| i32::from_ne_bytes(each) as f32),
            DType::UInt32 => wide(bytes, |each| u32::from_ne_bytes(each) as f32),
            DType::Int64 => wide(bytes, |each| i64::from_ne_bytes(each) as f32),
            DType::UInt64 => wide(bytes, |each| u64::from_ne_bytes(each) as f32),
            DType::Int8 => bytes.iter().map(|each| f32::from(*each as i8)).collect(),
            DType::UInt8 => bytes.iter().map(|each| f32::from(*each)).collect(),
            DType::Bool => bytes.iter().map(|each| f32::from(u8::from(*each != 0))).collect(),
            DType::Int4 => (0..elements).map(|index| f32::from((half(index) << 4) as i8 >> 4)).collect(),
            DType::UInt4 => (0..elements).map(|index| f32::from(half(index))).collect(),
        })
    }
}

impl fmt::Display for DType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// Half precision, as its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct F16(pub u16);

impl F16 {
    /// The nearest, ties to even; what is too large becomes infinity.
    pub fn from_f32(value: f32) -> F16 {
        let bits = value.to_bits();
        let sign = (bits >> 16 & 0x8000) as u16;
        let magnitude = bits & 0x7fff_ffff;
        if magnitude > 0x7f80_0000 {
            return F16(sign | 0x7e00 | (magnitude >> 13 & 0x3ff) as u16);
        }
        if magnitude >= 0x4780_0000 {
            return F16(sign | 0x7c00); // 65536 and above, infinity
        }
        if magnitude >= 0x3880_0000 {
            // Normal: the exponent's bias is less by 112. A mantissa that is rounded up may carry into the exponent, rightly.
            return F16(sign + (round_to_even(magnitude, 13) - (112 << 10)) as u16);
        }
        if magnitude < 0x3300_0000 {
            return F16(sign); // below half of the least
        }
        let shift = 126 - (magnitude >> 23); // subnormal: in units of 2^-24
        F16(sign + round_to_even(magnitude & 0x7f_ffff | 0x80_0000, shift) as u16)
    }

    /// Exact.
    pub fn to_f32(self) -> f32 {
        let sign = u32::from(self.0 & 0x8000) << 16;
        let exponent = u32::from(self.0 >> 10 & 31);
        let mantissa = u32::from(self.0 & 0x3ff);
        match exponent {
            0 => f32::from_bits(sign | (mantissa as f32 / 16_777_216.0).to_bits()),
            31 => f32::from_bits(sign | 0x7f80_0000 | mantissa << 13),
            _ => f32::from_bits(sign | (exponent + 112) << 23 | mantissa << 13),
        }
    }
}

/// bfloat16, as its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct BF16(pub u16);

impl BF16 {
    /// The nearest, ties to even.
    pub fn from_f32(value: f32) -> BF16 {
        let bits = value.to_bits();
        if value.is_nan() {
            return BF16((bits >> 16) as u16 | 0x40);
        }
        BF16(round_to_even(bits, 16) as u16)
    }

    /// Exact.
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

/// Eight bits, E4M3: no infinities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct F8(pub u8);

impl F8 {
    /// Exact.
    pub fn to_f32(self) -> f32 {
        let sign = if self.0 & 0x80 == 0 { 1.0 } else { -1.0 };
        let exponent = i32::from(self.0 >> 3 & 15);
        let mantissa = f32::from(self.0 & 7);
        match (exponent, self.0 & 7) {
            (15, 7) => f32::NAN.copysign(sign),
            (0, _) => sign * mantissa / 512.0,
            _ => sign * (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
        }
    }
}

/// One byte, 0 or 1. Not [`bool`]: what a device wrote is not Rust's promise to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Bool(pub u8);

impl From<bool> for Bool {
    fn from(value: bool) -> Bool {
        Bool(value.into())
    }
}

impl From<Bool> for bool {
    fn from(value: Bool) -> bool {
        value.0 != 0
    }
}

/// `bits` shifted right, to nearest, ties to even. shift: 1 to 24.
fn round_to_even(bits: u32, shift: u32) -> u32 {
    let half = 1 << (shift - 1);
    let rest = bits & ((1 << shift) - 1);
    let kept = bits >> shift;
    kept + u32::from(rest > half || (rest == half && kept & 1 == 1))
}

mod sealed {
    pub trait Sealed {}
}

/// Rust types that tensors' elements are read and written as.
///
/// # Safety
/// `DTYPE.bits()` is eight times the type's size; every pattern of bits is a value of it; it has no padding.
pub unsafe trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// The data type that this is.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($kind:ty: $dtype:ident;)*) => {
        $(
            impl sealed::Sealed for $kind {}
            // SAFETY: a number, or a transparent wrapper of one, of that size.
            unsafe impl Element for $kind {
                const DTYPE: DType = DType::$dtype;
            }
            const _: () = assert!(std::mem::size_of::<$kind>() * 8 == match DType::$dtype {
                DType::Float32 | DType::Int32 | DType::UInt32 => 32,
                DType::Int64 | DType::UInt64 => 64,
                DType::Float16 | DType::BFloat16 => 16,
                _ => 8,
            });
        )*
    };
}

elements! {
    f32: Float32;
    F16: Float16;
    i32: Int32;
    u32: UInt32;
    i64: Int64;
    u64: UInt64;
    i8: Int8;
    u8: UInt8;
    Bool: Bool;
    BF16: BFloat16;
    F8: Float8;
}

/// The elements' bytes.
pub(crate) fn bytes_of<T: Element>(elements: &[T]) -> &[u8] {
    // SAFETY: no padding.
    unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), std::mem::size_of_val(elements)) }
}

/// `count` zeros.
pub(crate) fn zeros<T: Element>(count: usize) -> Vec<T> {
    // SAFETY: zeros are a value of it.
    vec![unsafe { std::mem::zeroed() }; count]
}

/// The elements' bytes, to be written.
pub(crate) fn bytes_of_mut<T: Element>(elements: &mut [T]) -> &mut [u8] {
    let size = std::mem::size_of_val(elements);
    // SAFETY: no padding, and whatever is written is a value.
    unsafe { std::slice::from_raw_parts_mut(elements.as_mut_ptr().cast(), size) }
}

/// Elements out of bytes, wherever these lie. `None` if they are not a whole number of elements.
pub(crate) fn elements_of<T: Element>(bytes: &[u8]) -> Option<Vec<T>> {
    let size = std::mem::size_of::<T>();
    if bytes.len() % size != 0 {
        return None;
    }
    let mut elements = zeros::<T>(bytes.len() / size);
    bytes_of_mut(&mut elements).copy_from_slice(bytes);
    Some(elements)
}

/// Of a data type that is not `T`'s.
pub(crate) fn check<T: Element>(dtype: DType, what: &str) -> Result<()> {
    if dtype == T::DTYPE {
        return Ok(());
    }
    Err(Error::new(Status::DType, format!("{what} is {dtype}; {} holds {}", std::any::type_name::<T>(), T::DTYPE)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_round_trip() {
        for dtype in DType::ALL {
            assert_eq!(DType::from_raw(dtype.raw()), Ok(*dtype));
            let constant = format!("TRTXPY_{}", dtype.name().to_uppercase());
            assert!(ffi::CONSTANTS.contains(&(constant.as_str(), i64::from(dtype.raw()))), "{constant}");
        }
        assert_eq!(DType::from_raw(10).unwrap_err().status, Status::Unsupported);
    }

    #[test]
    fn sizes_are_packed_and_checked() {
        assert_eq!(DType::Int4.bytes(3), Some(2));
        assert_eq!(DType::UInt4.bytes(usize::MAX), Some(usize::MAX / 2 + 1));
        assert_eq!(DType::Float32.bytes(0), Some(0));
        assert_eq!(DType::Int64.bytes(usize::MAX / 8), None);
        assert_eq!(DType::Int64.bytes(usize::MAX / 4), None);
    }

    #[test]
    fn half_precision_round_trips_and_rounds() {
        for bits in 0..=u16::MAX {
            let value = F16(bits);
            let back = F16::from_f32(value.to_f32());
            if value.to_f32().is_nan() {
                assert!(back.to_f32().is_nan(), "{bits:#x}");
            } else {
                assert_eq!(back, value, "{bits:#x}");
            }
        }
        assert_eq!(F16::from_f32(1.0), F16(0x3c00));
        assert_eq!(F16::from_f32(-2.0), F16(0xc000));
        assert_eq!(F16::from_f32(65504.0), F16(0x7bff));
        assert_eq!(F16::from_f32(65519.9), F16(0x7bff));
        assert_eq!(F16::from_f32(65520.0), F16(0x7c00));
        assert_eq!(F16::from_f32(f32::INFINITY), F16(0x7c00));
        assert_eq!(F16::from_f32(1e-10), F16(0));
        assert_eq!(F16::from_f32(-1e-10), F16(0x8000));
        assert_eq!(F16::from_f32(2.0_f32.powi(-25)), F16(0)); // a tie, to even
        assert_eq!(F16::from_f32(2.0_f32.powi(-25) * 1.001), F16(1));
        assert_eq!(F16::from_f32(1.5 * 2.0_f32.powi(-24)), F16(2)); // a tie, to even
        assert_eq!(F16::from_f32(1.0 + 2.0_f32.powi(-11)), F16(0x3c00)); // a tie, to even
        assert_eq!(F16::from_f32(1.0 + 3.0 * 2.0_f32.powi(-11)), F16(0x3c02)); // a tie, to even
        assert_eq!(F16::from_f32(2.0 - 2.0_f32.powi(-12)), F16(0x4000)); // carries
        assert!(F16::from_f32(f32::from_bits(0x7f80_0001)).to_f32().is_nan());
    }

    #[test]
    fn half_precision_is_the_nearest() {
        let mut bits = 12345_u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(bits >> 2 & 0x0fff_ffff | 0x3000_0000);
            let found = F16::from_f32(value);
            let error = |candidate: u16| (f64::from(F16(candidate).to_f32()) - f64::from(value)).abs();
            if found.0 < 0x7bff {
                assert!(error(found.0) <= error(found.0 + 1), "{value}");
                assert!(found.0 == 0 || error(found.0) <= error(found.0 - 1), "{value}");
            }
        }
    }

    #[test]
    fn other_floats() {
        for bits in 0..=u16::MAX {
            let value = BF16(bits).to_f32();
            assert!(value.is_nan() || BF16::from_f32(value) == BF16(bits));
        }
        assert_eq!(BF16::from_f32(1.0 + 2.0_f32.powi(-8)), BF16(0x3f80)); // a tie, to even
        assert!(BF16::from_f32(f32::NAN).to_f32().is_nan());
        assert_eq!(F8(0x38).to_f32(), 1.0);
        assert_eq!(F8(0x7e).to_f32(), 448.0);
        assert_eq!(F8(0x81).to_f32(), -1.0 / 512.0);
        assert!(F8(0x7f).to_f32().is_nan());
    }

    #[test]
    fn any_type_becomes_f32() {
        assert_eq!(DType::Float32.to_f32(bytes_of(&[1.5_f32, -2.0]), 2), Some(vec![1.5, -2.0]));
        assert_eq!(DType::Float16.to_f32(bytes_of(&[F16(0x3c00)]), 1), Some(vec![1.0]));
        assert_eq!(DType::BFloat16.to_f32(bytes_of(&[BF16(0xbf80)]), 1), Some(vec![-1.0]));
        assert_eq!(DType::Int64.to_f32(bytes_of(&[-7_i64]), 1), Some(vec![-7.0]));
        assert_eq!(DType::UInt64.to_f32(bytes_of(&[1_u64 << 40]), 1), Some(vec![(1_u64 << 40) as f32]));
        assert_eq!(DType::Int32.to_f32(bytes_of(&[-1_i32]), 1), Some(vec![-1.0]));
        assert_eq!(DType::UInt32.to_f32(bytes_of(&[u32::MAX]), 1), Some(vec![4_294_967_296.0]));
        assert_eq!(DType::Int8.to_f32(&[0xff], 1), Some(vec![-1.0]));
        assert_eq!(DType::UInt8.to_f32(&[0xff], 1), Some(vec![255.0]));
        assert_eq!(DType::Bool.to_f32(&[0, 1], 2), Some(vec![0.0, 1.0]));
        assert_eq!(DType::Float8.to_f32(&[0x38], 1), Some(vec![1.0]));
        assert_eq!(DType::Int4.to_f32(&[0x2f, 0x07], 3), Some(vec![-1.0, 2.0, 7.0]));
        assert_eq!(DType::UInt4.to_f32(&[0x2f], 2), Some(vec![15.0, 2.0]));
        assert_eq!(DType::Int32.to_f32(&[0; 5], 1), None);
        assert_eq!(DType::Int4.to_f32(&[0], 3), None);
        assert_eq!(DType::Float32.to_f32(&[], 0), Some(vec![]));
    }

    #[test]
    fn elements_come_out_of_bytes_that_are_not_aligned() {
        let bytes = [9, 1, 0, 0, 0, 2, 0, 0, 0];
        assert_eq!(elements_of::<u32>(&bytes[1..]), Some(vec![1_u32.to_le(), 2_u32.to_le()]));
        assert_eq!(elements_of::<u32>(&bytes), None);
        assert_eq!(
            check::<f32>(DType::Int32, "tensor 'x'").unwrap_err().message,
            "tensor 'x' is int32; f32 holds float32"
        );
    }
}
