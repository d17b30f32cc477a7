// What `npm install` does first: ask the registry. And what it must not be able to do.
for (const url of ['https://registry.npmjs.org/', 'https://unlisted.example/']) {
  const started = Date.now();
  try {
    const answer = await fetch(url);
    console.log(url, answer.status);
  } catch (error) {
    console.log(url, error.cause?.code, Date.now() - started < 1000 ? 'at once' : 'late');
  }
}
