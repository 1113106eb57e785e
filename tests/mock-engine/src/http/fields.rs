//! A request body, field by field, so that a wrong field is named.

use std::collections::HashMap;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::error::ApiError;

/// A request's body, whole.
pub(super) struct RawBody(pub(super) Bytes);

impl<S: Send + Sync> FromRequest<S> for RawBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let body = Bytes::from_request(request, state).await;
        body.map(Self).map_err(|error: BytesRejection| {
            let kind = error.status().canonical_reason().unwrap_or("BadRequestError");
            ApiError::new(
                error.status(),
                kind,
                format!("the request body cannot be read: {}", error.body_text()),
            )
        })
    }
}

/// The fields of a JSON object; unknown ones are ignored, as vLLM does.
pub struct Fields<'a>(HashMap<String, &'a RawValue>);

impl<'a> Fields<'a> {
    /// Reads the names of the fields.
    pub fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(body).map(Self).map_err(|error| {
            ApiError::bad_request("", format!("the request body is not a JSON object: {error}"))
        })
    }

    /// A field's JSON; `None` where it is absent or null.
    pub fn raw(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).map(|value| value.get()).filter(|value| *value != "null")
    }

    /// A field's value; `None` where it is absent or null.
    pub fn get<T: Deserialize<'a>>(&self, name: &str) -> Result<Option<T>, ApiError> {
        let Some(json) = self.raw(name) else { return Ok(None) };
        serde_json::from_str(json).map(Some).map_err(|error| {
            let reason = error.to_string();
            let reason = reason.split(" at line ").next().unwrap_or_default();
            ApiError::bad_request(name, format!("{name}: {reason}"))
        })
    }

    /// A field's value, or another one.
    pub fn get_or<T: Deserialize<'a>>(&self, name: &str, default: T) -> Result<T, ApiError> {
        Ok(self.get(name)?.unwrap_or(default))
    }
}
