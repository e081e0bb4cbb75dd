//! `ffi` is `trtxpy.h`: a C compiler says so.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::process::Command;

use trtxpy::ffi;

/// C's name for one of Rust's types.
fn in_c(kind: &str) -> String {
    let kind = kind.trim();
    if let Some(pointee) = kind.strip_prefix("*const ") {
        return format!("const {}*", in_c(pointee));
    }
    if let Some(pointee) = kind.strip_prefix("*mut ") {
        return format!("{}*", in_c(pointee));
    }
    if let Some((element, count)) = kind.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')?.split_once(';')) {
        return format!("{}[{}]", in_c(element), count.trim());
    }
    match kind {
        "i32" => "int32_t",
        "u32" => "uint32_t",
        "i64" => "int64_t",
        "u64" => "uint64_t",
        "usize" => "size_t",
        "c_char" => "char",
        "c_int" => "int",
        "c_void" => "void",
        "DLManagedTensor" => "struct DLManagedTensor",
        named if named.starts_with("trtxpy_") => named,
        other => panic!("a type that this test does not know: {other}"),
    }
    .to_owned()
}

/// Compile a program against the header and run it.
fn ask_c(name: &str, program: &str) -> String {
    let source = common::scratch(&format!("{name}.c"));
    let binary = common::scratch(name);
    std::fs::write(&source, program).unwrap();
    common::run(
        common::compiler()
            .args(["-std=gnu11", "-Wall", "-Werror", "-I"])
            .arg(common::manifest().join("../include"))
            .arg(&source)
            .arg("-o")
            .arg(&binary),
    );
    common::run(&mut Command::new(&binary))
}

#[test]
fn structs_lie_as_in_c() {
    let mut program = String::from("#include <stdio.h>\n#include \"trtxpy.h\"\nint main(void) {\n");
    let mut expected = String::new();
    for layout in ffi::LAYOUTS {
        let name = layout.name;
        writeln!(program, "printf(\"{name} %zu %zu\\n\", sizeof({name}), _Alignof({name}));").unwrap();
        writeln!(expected, "{name} {} {}", layout.size, layout.alignment).unwrap();
        for member in layout.members {
            let (field, kind) = (member.name, in_c(member.kind));
            writeln!(program, "printf(\"{name}.{field} %zu\\n\", offsetof({name}, {field}));").unwrap();
            writeln!(
                program,
                "_Static_assert(__builtin_types_compatible_p(__typeof__((({name}*)0)->{field}), {kind}), \"{name}.{field}\");"
            )
            .unwrap();
            writeln!(expected, "{name}.{field} {}", member.offset).unwrap();
        }
    }
    program.push_str("return 0;\n}\n");
    assert_eq!(ask_c("layouts", &program), expected);
}

#[test]
fn functions_are_declared_as_in_c() {
    let mut program = String::from("#include \"trtxpy.h\"\n");
    for function in ffi::FUNCTIONS {
        let arguments: Vec<_> = function.arguments.iter().map(|kind| in_c(kind)).collect();
        let arguments = if arguments.is_empty() { "void".to_owned() } else { arguments.join(", ") };
        let (name, returns) = (function.name, in_c(function.returns));
        writeln!(
            program,
            "_Static_assert(__builtin_types_compatible_p(__typeof__({name}), {returns}({arguments})), \"{name}\");"
        )
        .unwrap();
    }
    program.push_str("int main(void) { return 0; }\n");
    ask_c("functions", &program);
}

#[test]
fn constants_have_cs_values() {
    let mut program = String::from("#include <stdio.h>\n#include \"trtxpy.h\"\nint main(void) {\n");
    let mut expected = String::new();
    for (name, value) in ffi::CONSTANTS {
        writeln!(program, "printf(\"{name} %lld\\n\", (long long){name});").unwrap();
        writeln!(expected, "{name} {value}").unwrap();
    }
    program.push_str("return 0;\n}\n");
    assert_eq!(ask_c("constants", &program), expected);
}

/// Members that the INIT macros set to something else than 0.
#[test]
fn defaults_are_the_init_macros() {
    macro_rules! compare {
        ($($name:ident $init:ident { $($member:ident),* })*) => {{
            let mut program = String::from("#include <stdio.h>\n#include \"trtxpy.h\"\nint main(void) {\n");
            let mut expected = String::new();
            $(
                let found = ffi::$name::default();
                program.push_str(concat!("{ ", stringify!($name), " it = ", stringify!($init), ";\n"));
                $(
                    program.push_str(concat!("printf(\"%lld\\n\", (long long)it.", stringify!($member), ");\n"));
                    writeln!(expected, "{}", found.$member as i64).unwrap();
                )*
                program.push_str("}\n");
            )*
            program.push_str("return 0;\n}\n");
            assert_eq!(ask_c("defaults", &program), expected);
        }};
    }
    compare! {
        trtxpy_init_options TRTXPY_INIT_OPTIONS_INIT { struct_size, python }
        trtxpy_context_options TRTXPY_CONTEXT_OPTIONS_INIT {
            struct_size, backend, device, completion, max_device_bytes, lean_library, max_cached_models, allow_host_code
        }
        trtxpy_context_info TRTXPY_CONTEXT_INFO_INIT { struct_size, backend, is_mock, device }
        trtxpy_context_statistics TRTXPY_CONTEXT_STATISTICS_INIT { struct_size, device_bytes, cache_misses }
        trtxpy_graph_options TRTXPY_GRAPH_OPTIONS_INIT {
            struct_size, ranges, range_count, precision, optimization_level, lanes, slots, max_graphs, no_cuda_graphs, reserved
        }
        trtxpy_tensor_info TRTXPY_TENSOR_INFO_INIT { struct_size, name, dtype, engine_dtype }
        trtxpy_graph_statistics TRTXPY_GRAPH_STATISTICS_INIT { struct_size, submitted, slots }
        trtxpy_tensor_desc TRTXPY_TENSOR_DESC_INIT { struct_size, dtype, location }
        trtxpy_dispatch_options TRTXPY_DISPATCH_OPTIONS_INIT { struct_size, timeout_ns, resize_outputs, reserved }
        trtxpy_submit_options TRTXPY_SUBMIT_OPTIONS_INIT { struct_size, userdata, queue, token, resize_outputs, reserved }
        trtxpy_array TRTXPY_ARRAY_INIT { struct_size, name, dtype, reserved, data, bytes }
    }
}

/// Nothing of the header is missing here.
#[test]
fn everything_of_the_header_is_there() {
    let header = std::fs::read_to_string(common::manifest().join("../include/trtxpy.h")).unwrap();
    let word = |text: &str| -> String {
        text.chars().take_while(|each| each.is_ascii_alphanumeric() || *each == '_').collect()
    };
    let mut functions = BTreeSet::new();
    for part in header.split("TRTXPY_API ").skip(1) {
        let declaration = part.split('(').next().unwrap();
        if let Some(at) = declaration.rfind("trtxpy_") {
            functions.insert(word(&declaration[at..]));
        }
    }
    let ours: BTreeSet<_> = ffi::FUNCTIONS.iter().map(|function| function.name.to_owned()).collect();
    assert_eq!(functions, ours);

    let mut structs = BTreeSet::new();
    for part in header.split("typedef struct trtxpy_").skip(1) {
        let name = format!("trtxpy_{}", word(part));
        if !name.ends_with("_handle") {
            structs.insert(name);
        }
    }
    let ours: BTreeSet<_> = ffi::LAYOUTS.iter().map(|layout| layout.name.to_owned()).collect();
    assert_eq!(structs, ours);

    let mut constants = BTreeMap::new();
    for line in header.lines().map(str::trim_start) {
        let line = line.strip_prefix("enum {").unwrap_or(line);
        for part in line.split(',') {
            let Some((name, value)) = part.split_once('=') else { continue };
            let (name, value) = (name.trim(), word(value.trim()));
            if name.starts_with("TRTXPY_") && word(name) == name {
                constants.insert(name.to_owned(), value.parse::<i64>().unwrap());
            }
        }
    }
    assert!(constants.len() > 40, "{constants:?}");
    let ours: BTreeMap<_, _> = ffi::CONSTANTS.iter().map(|(name, value)| (name.to_string(), *value)).collect();
    for (name, value) in constants {
        assert_eq!(ours.get(&name), Some(&value), "{name}");
    }
}
