// Swagger UI, shown with what this server says of itself. Keys that somebody enters stay in this tab's memory.

window.SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#api",
  deepLinking: true,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
  persistAuthorization: false,
  validatorUrl: null, // asks nobody whether the description is valid
});
