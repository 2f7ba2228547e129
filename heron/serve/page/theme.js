// The chosen theme, set before anything is painted; page.js offers the choice. Without one the system's is shown.
{
  const chosen = localStorage.getItem("heron.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
