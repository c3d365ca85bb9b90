BEGIN TRANSACTION;
CREATE TABLE "_sqlite_migrations" (
   "id" INTEGER PRIMARY KEY,
   "migration_set" TEXT,
   "name" TEXT,
   "applied_at" TEXT
);
INSERT INTO "_sqlite_migrations" VALUES(1,'journal','create_tables','2026-11-22 11:42:35.189458+00:00');
CREATE TABLE "models" (
   "model" TEXT PRIMARY KEY,
   "state" TEXT
) STRICT;
INSERT INTO "models" VALUES('kinds','{"model":"kinds","stage":"fetching","order":7,"target":{"model":"kinds","version":"2","variant":"default","manifest":{"digest":"sha256:bedbe217a47cf0b6f225dd3e539a0a1115cff37fd2a84355b41d4db8f0962fdb","size":100},"files":[{"name":"model.onnx","artifact":{"digest":"sha256:97e2521720cb4b3821c7ed9df7dbca7a63e04b42ba05ffe3e15dc992f227ae36","size":1000},"patches":[{"base":"sha256:cd36b49d7b2a8b5e4e13663cb54c5e1338c17b7d3af1c506fb3842bd08291822","target":{"digest":"sha256:97e2521720cb4b3821c7ed9df7dbca7a63e04b42ba05ffe3e15dc992f227ae36","size":1000},"patch":{"digest":"sha256:7c9a84fa3d23df47e85ff8c0135aae8c8bc75e3b1ada9dc23cfc0a33d31c346b","size":30},"codec":"known.1"},{"base":"sha256:cd36b49d7b2a8b5e4e13663cb54c5e1338c17b7d3af1c506fb3842bd08291822","target":{"digest":"sha256:63ba2051a93e83627288e213e25b77fbd6b2e265569891cce4c1b1c43b22042f","size":1000},"patch":{"digest":"sha256:be9076c7310c20b65ee651ad250f14bb3fd5091d8fc8055e0bb584589f670abb","size":10},"codec":"known.1"},{"base":"sha256:63ba2051a93e83627288e213e25b77fbd6b2e265569891cce4c1b1c43b22042f","target":{"digest":"sha256:97e2521720cb4b3821c7ed9df7dbca7a63e04b42ba05ffe3e15dc992f227ae36","size":1000},"patch":{"digest":"sha256:2298dc5942df9ee407b94148c296305463b630a568251c9fb078f945f874d8ac","size":10},"codec":"known.1"}],"parts":[{"base":"sha256:cd36b49d7b2a8b5e4e13663cb54c5e1338c17b7d3af1c506fb3842bd08291822","base_index":{"digest":"sha256:d7a4ce0efd628435d47489826649c6e62b697995ecc17792afa87eda008c2951","size":20},"index":{"digest":"sha256:8f1af27db779f6172b30b474003f9e57efc1e8486d7b39e7dc063ddfe68bb398","size":20},"bytes":300}]},{"name":"weights.bin","artifact":{"digest":"sha256:b6776a5e4ab488d8e9945941ab1495e02928868bde77e43e726cd2b48c60381b","size":1000},"patches":[],"parts":[]}],"order":7,"probation_s":10.0,"max_bytes":9000,"on_exceed":"fail"},"traceparent":"00-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-bbbbbbbbbbbbbbbb-01","installed":{"slot":"a","version":"1","variant":"default","files":{"model.onnx":{"digest":"sha256:9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4","size":5},"weights.bin":{"digest":"sha256:9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4","size":5}},"onnx_file":"model.onnx","manifest":{"digest":"sha256:9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4","size":5},"inputs":[],"outputs":[],"activated_at":2.0},"candidate":null,"previous":{"slot":"a","version":"1","variant":"default","files":{"model.onnx":{"digest":"sha256:9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4","size":5},"weights.bin":{"digest":"sha256:9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4","size":5}},"onnx_file":"model.onnx","manifest":{"digest":"sha256:9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4","size":5},"inputs":[],"outputs":[],"activated_at":2.0},"tally":{"strategy":"delta","transport":"mqtt","downloads":{"sha256:9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4":9},"resumed_bytes":1},"attempt":2,"redownloads":1,"strikes":1,"refused":["sha256:a4895eb44afc336fecbba6e520cd67e178dace0276655d102fceffa8e5f70570"],"refusal":"patch not used: it is damaged","trouble":"unavailable: no network","started_at":3.0,"quarantine":[{"files":"sha256:9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4","version":"0","order":3,"reason":"unhealthy"}],"last_update":{"generation":6,"version":"1","outcome":"succeeded","reason":"","detail":"","strategy":"none","transport":"none","bytes_transferred":0,"full_bytes":0,"resumed_bytes":0,"started_at":0.0,"activated_at":null,"finished_at":0.0}}');
CREATE TABLE "numbers" (
   "name" TEXT PRIMARY KEY,
   "value" INTEGER
) STRICT;
INSERT INTO "numbers" VALUES('running',1);
INSERT INTO "numbers" VALUES('generation',7);
INSERT INTO "numbers" VALUES('epoch',3);
CREATE TABLE "orders" (
   "id" INTEGER PRIMARY KEY,
   "generation" INTEGER,
   "etag" TEXT,
   "envelope" BLOB NOT NULL
) STRICT;
INSERT INTO "orders" VALUES(1,7,'sha256:0000000000000000000000000000000000000000000000000000000000000000',X'7B7D');
CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name"
    ON "_sqlite_migrations" ("migration_set", "name");
COMMIT;
