//! Shapes and names on their way to the library and back.

use std::ffi::CString;

use crate::error::{Error, Result};
use crate::ffi;

/// The library's struct for these axes.
pub(crate) fn raw(shape: &[i64]) -> Result<ffi::trtxpy_shape> {
    let mut raw = ffi::trtxpy_shape::default();
    if shape.len() > ffi::TRTXPY_MAX_RANK {
        return Err(Error::invalid(format!(
            "a shape has {} axes; expected at most {}",
            shape.len(),
            ffi::TRTXPY_MAX_RANK
        )));
    }
    raw.rank = shape.len() as i32;
    raw.dims[..shape.len()].copy_from_slice(shape);
    Ok(raw)
}

/// The axes in the library's struct. The header knows ranks 0 to 8; another number, which only a fault could give, must not
/// reach outside of the array: below 0 it counts as none, above as all of them.
pub(crate) fn axes(raw: &ffi::trtxpy_shape) -> Vec<i64> {
    let rank = usize::try_from(raw.rank).unwrap_or(0).min(ffi::TRTXPY_MAX_RANK);
    raw.dims[..rank].to_vec()
}

/// How many elements; `None` for axes below 0, or more than can be.
pub(crate) fn elements(shape: &[i64]) -> Option<usize> {
    if shape.iter().any(|axis| *axis < 0) {
        return None;
    }
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1_usize, |product, axis| product.checked_mul(usize::try_from(*axis).ok()?))
}

/// For people: `(2, 3)`.
pub(crate) fn text(shape: &[i64]) -> String {
    let axes: Vec<_> = shape.iter().map(i64::to_string).collect();
    format!("({})", axes.join(", "))
}

/// For C.
pub(crate) fn name(what: &str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::invalid(format!("{what} {text:?} has a NUL")))
}

/// Shapes by name, for C.
pub(crate) struct NamedShapes {
    pub(crate) raw: Vec<ffi::trtxpy_named_shape>,
    _names: Vec<CString>,
}

impl NamedShapes {
    pub(crate) fn new(shapes: &[(&str, &[i64])]) -> Result<NamedShapes> {
        let names: Vec<_> = shapes.iter().map(|(each, _)| name("tensor name", each)).collect::<Result<_>>()?;
        let raw = names
            .iter()
            .zip(shapes)
            .map(|(name, (_, shape))| Ok(ffi::trtxpy_named_shape { name: name.as_ptr(), shape: raw(shape)? }))
            .collect::<Result<_>>()?;
        Ok(NamedShapes { raw, _names: names })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    #[test]
    fn shapes_round_trip() {
        for shape in [&[][..], &[0], &[2, 3], &[1, 2, 3, 4, 5, 6, 7, 8], &[-1, 4]] {
            assert_eq!(axes(&raw(shape).unwrap()), shape);
        }
        assert_eq!(raw(&[1; 9]).unwrap_err().status, Status::InvalidArgument);
        assert_eq!(text(&[2, -1]), "(2, -1)");
        assert_eq!(axes(&ffi::trtxpy_shape { rank: 99, reserved: 0, dims: [1; 8] }), [1; 8]);
        assert_eq!(axes(&ffi::trtxpy_shape { rank: -1, reserved: 0, dims: [1; 8] }), [0_i64; 0]);
    }

    #[test]
    fn elements_are_counted_and_checked() {
        assert_eq!(elements(&[]), Some(1));
        assert_eq!(elements(&[2, 3]), Some(6));
        assert_eq!(elements(&[i64::MAX, 0, i64::MAX]), Some(0));
        assert_eq!(elements(&[i64::MAX, 3]), None);
        assert_eq!(elements(&[-1, 0]), None);
    }

    #[test]
    fn names_must_not_have_a_nul() {
        assert!(NamedShapes::new(&[("a\0b", &[1])]).is_err());
        assert_eq!(NamedShapes::new(&[("x", &[1]), ("y", &[])]).unwrap().raw.len(), 2);
    }
}
