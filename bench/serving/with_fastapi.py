"FastAPI as its documentation has it: raw bytes in, work in its thread pool."
from engine import Engine
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

app, engine = FastAPI(), Engine()


@app.post("/predict")
async def predict(request: Request): return await run_in_threadpool(engine.predict, await request.body())


@app.get("/readyz")
def ready(): return {}
