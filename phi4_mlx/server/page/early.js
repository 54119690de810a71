// The user's own theme, set before the first paint. It is no module, so that it need not wait for any.
try {
  const { theme } = JSON.parse(localStorage.getItem("phi4_mlx.settings")) ?? {};
  if (theme) document.documentElement.dataset.theme = theme;
} catch { /* no storage, or an older page's */ }
