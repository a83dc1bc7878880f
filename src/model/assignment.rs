//! Which execution provider computes which nodes of a network.
//!
//! A provider that was registered may still decline nodes, and ONNX Runtime then computes these on the CPU without a word. It keeps
//! a record of it where a session asks for one ([`RECORD_KEY`]), which `ort` does not read yet.
//!
//! This module is unsafe because it calls ONNX Runtime's C interface. All that it reads belongs to the session, which outlives the
//! call, and is copied before the function returns.
#![expect(unsafe_code, reason = "ONNX Runtime's C interface, where ort has no safe one")]

use std::ffi::{CStr, c_char};
use std::ptr;

use ort::AsPointer as _;
use ort::session::Session;
use ort::sys::{OrtEpAssignedNode, OrtEpAssignedSubgraph, OrtStatusPtr};

/// The setting by which a session keeps the record.
pub(super) const RECORD_KEY: &str = "session.record_ep_graph_assignment_info";

/// Some nodes that one provider computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Assigned {
    /// ONNX Runtime's name for the provider, such as `CPUExecutionProvider`.
    pub(super) provider: String,
    /// Operator of each node, such as `Conv`.
    pub(super) operators: Vec<String>,
}

/// The assignment of a session that was built with [`RECORD_KEY`].
pub(super) fn assignment(session: &Session) -> ort::Result<Vec<Assigned>> {
    let api = ort::api();
    let mut subgraphs: *const *const OrtEpAssignedSubgraph = ptr::null();
    let mut num_subgraphs = 0;
    // SAFETY: the session is alive, and both places are ours. What is written there belongs to the session.
    check(unsafe {
        (api.Session_GetEpGraphAssignmentInfo)(session.ptr(), &raw mut subgraphs, &raw mut num_subgraphs)
    })?;
    (0..num_subgraphs)
        .map(|number| {
            // SAFETY: `number` is below the length that came with the pointer.
            let subgraph = unsafe { *subgraphs.add(number) };
            let mut provider: *const c_char = ptr::null();
            // SAFETY: the subgraph is of this session; the name that is written belongs to it.
            check(unsafe { (api.EpAssignedSubgraph_GetEpName)(subgraph, &raw mut provider) })?;
            let mut nodes: *const *const OrtEpAssignedNode = ptr::null();
            let mut num_nodes = 0;
            // SAFETY: as above.
            check(unsafe { (api.EpAssignedSubgraph_GetNodes)(subgraph, &raw mut nodes, &raw mut num_nodes) })?;
            let operators = (0..num_nodes)
                .map(|number| {
                    // SAFETY: `number` is below the length that came with the pointer.
                    let node = unsafe { *nodes.add(number) };
                    let mut operator: *const c_char = ptr::null();
                    // SAFETY: the node is of this subgraph; the name that is written belongs to it.
                    check(unsafe { (api.EpAssignedNode_GetOperatorType)(node, &raw mut operator) })?;
                    // SAFETY: the call succeeded, so this is a string that ends with a zero.
                    Ok(unsafe { text(operator) })
                })
                .collect::<ort::Result<_>>()?;
            // SAFETY: the call succeeded, so this is a string that ends with a zero.
            Ok(Assigned { provider: unsafe { text(provider) }, operators })
        })
        .collect()
}

/// Copies a string of the C interface.
///
/// # Safety
/// `chars` is null, or points to a string that ends with a zero and lives for the call.
unsafe fn text(chars: *const c_char) -> String {
    if chars.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(chars) }.to_string_lossy().into_owned()
}

/// Turns a status of the C interface into a result, and releases it.
fn check(status: OrtStatusPtr) -> ort::Result<()> {
    if status.0.is_null() {
        return Ok(());
    }
    let api = ort::api();
    // SAFETY: a status that is not null has a message, which lives until the status is released, after it was copied.
    let message = unsafe { text((api.GetErrorMessage)(status.0)) };
    // SAFETY: the status is ours, and is not used again.
    unsafe { (api.ReleaseStatus)(status.0) };
    Err(ort::Error::new(message))
}
