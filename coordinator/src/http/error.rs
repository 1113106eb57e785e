//! Errors in OpenAI's shape, with vLLM's names for their types.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::json;

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status, also the error's code.
    pub status: StatusCode,
    /// For people: what is wrong, and what would mend it.
    pub message: String,
    /// The request field it is about.
    pub param: Option<&'static str>,
    /// When to come back, for 429 and 503; at least a second.
    pub retry_after_seconds: Option<u64>,
}

impl ApiError {
    /// The request cannot be served as it is.
    pub fn bad_request(message: impl Into<String>, param: Option<&'static str>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.into(), param, retry_after_seconds: None }
    }

    /// No such model.
    pub fn unknown_model(name: &str) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            message: format!("The model `{name}` does not exist."),
            param: Some("model"),
            retry_after_seconds: None,
        }
    }

    /// Any other status.
    pub fn of(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, retry_after_seconds: None }
    }

    /// The same, with the time after which to come back.
    pub fn retry_after(self, seconds: u64) -> Self {
        Self { retry_after_seconds: Some(seconds), ..self }
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::NOT_FOUND => "NotFoundError",
            StatusCode::METHOD_NOT_ALLOWED => "MethodNotAllowedError",
            StatusCode::PAYLOAD_TOO_LARGE => "PayloadTooLargeError",
            StatusCode::BAD_GATEWAY => "BadGatewayError",
            StatusCode::TOO_MANY_REQUESTS => "TooManyRequestsError",
            StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailableError",
            status if status.is_server_error() => "InternalServerError",
            _ => "BadRequestError",
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let error = json!({
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.status.as_u16(),
        });
        let mut response = (self.status, Json(json!({ "error": error }))).into_response();
        if matches!(self.status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
            let seconds = http::HeaderValue::from(self.retry_after_seconds.unwrap_or(1).max(1));
            response.headers_mut().insert(http::header::RETRY_AFTER, seconds);
        }
        response
    }
}
