"""Claims of vision-language methods on one model: settings, what is asked, and the page."""
