// Swagger UI over the document of the application that this page belongs to.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null, // which would be another host's
});
