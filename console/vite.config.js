import { defineConfig } from "vite";

export default defineConfig({
  base: "./", // relative: a proxy may serve the page under a path
  build: {
    outDir: "../service/console/dist",
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0, // the content-security-policy allows files, nothing inline
    modulePreload: { polyfill: false },
  },
  // `npm run dev` beside `python -m service serve`.
  server: { proxy: { "/v1": "http://127.0.0.1:8080", "/docs": "http://127.0.0.1:8080", "/table": "http://127.0.0.1:8080" } },
});
