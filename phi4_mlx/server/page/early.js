// What the first paint depends on: the user's own theme, and the sidebar if it is closed. It is no module, so that it
// need not wait for any.
try {
  const recall = (name) => JSON.parse(localStorage.getItem(`phi4_mlx.${name}`));
  const { theme } = recall("settings") ?? {};
  if (theme) document.documentElement.dataset.theme = theme;
  document.documentElement.classList.toggle("sidebar-closed", recall("sidebar") === false);
} catch { /* no storage, or an older page's */ }
