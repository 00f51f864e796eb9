BEGIN TRANSACTION;
CREATE TABLE artifacts (
	set_name VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	fingerprint VARCHAR NOT NULL, 
	status VARCHAR NOT NULL, 
	detail VARCHAR NOT NULL, 
	updated_at VARCHAR NOT NULL, 
	PRIMARY KEY (set_name, kind), 
	FOREIGN KEY(set_name) REFERENCES forget_sets (name) ON DELETE CASCADE
);
INSERT INTO "artifacts" VALUES('potter','phrases','pppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppp','ready','1 phrases in 0.01 s','2026-11-27T01:13:47.550+00:00');
INSERT INTO "artifacts" VALUES('potter','similarity','vvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv','ready','3 vectors','2026-11-27T01:13:47.550+00:00');
INSERT INTO "artifacts" VALUES('potter','assistant','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','ready','1.0 MiB','2026-11-27T01:13:47.579+00:00');
INSERT INTO "artifacts" VALUES('potter','calibration','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','ready','{"reference": 0.3, "strength": 1.75}','2026-11-27T01:13:47.614+00:00');
INSERT INTO "artifacts" VALUES('potter','gate','vvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv','ready','{"threshold": 0.71, "said_threshold": 0.83, "said_delta": null, "said_negatives": 0, "epsilon": 0.05, "delta": 0.01, "positives": 20, "negatives": 100, "kept": true, "curves": [], "named_by_others": 0, "encoder": "e"}','2026-11-27T01:13:47.626+00:00');
CREATE TABLE audit (
	revision INTEGER NOT NULL, 
	at VARCHAR NOT NULL, 
	actor VARCHAR NOT NULL, 
	action VARCHAR NOT NULL, 
	subject VARCHAR NOT NULL, 
	detail JSON NOT NULL, 
	previous VARCHAR NOT NULL, 
	hash VARCHAR NOT NULL, 
	PRIMARY KEY (revision)
);
INSERT INTO "audit" VALUES(1,'2026-11-27T01:13:47.570+00:00','loopback','forget_set.create','potter','{"fingerprint": "3a67c42f7c309c74ab5cbcc8d9fe5aa62393499a4f0af12be3d8466e4bdb4810", "phrases": 1, "aliases": 1, "questions": 1, "texts": 0, "requester": "", "legal_basis": "", "expires_at": null}','0000000000000000000000000000000000000000000000000000000000000000','e918200ec43c7880480778f6b6b2e3504e921be65f5b87f5df1e2a5a86d1c2fb');
INSERT INTO "audit" VALUES(2,'2026-11-27T01:13:47.601+00:00','training','forget_set.assistant','potter','{"assistant": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}','e918200ec43c7880480778f6b6b2e3504e921be65f5b87f5df1e2a5a86d1c2fb','4c182b7fc04421395f40914f537633521f98243c7f43dd479cc63a4473d539a1');
INSERT INTO "audit" VALUES(3,'2026-11-27T01:13:47.615+00:00','loopback','forget_set.calibrate','potter','{"strength": 1.75, "assistant": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}','4c182b7fc04421395f40914f537633521f98243c7f43dd479cc63a4473d539a1','3f039a1a833118e0ee75a0865f65c41f824dd8d781b2ce82ce8bbf6eb2d836bd');
INSERT INTO "audit" VALUES(4,'2026-11-27T01:13:47.627+00:00','loopback','forget_set.gate','potter','{"threshold": 0.71, "said_threshold": 0.83, "epsilon": 0.05, "delta": 0.01, "positives": 20, "negatives": 100}','3f039a1a833118e0ee75a0865f65c41f824dd8d781b2ce82ce8bbf6eb2d836bd','b01b206305248f1a51ab26c63696f51c85fa8cb537e2b054240c4fef60b61710');
INSERT INTO "audit" VALUES(5,'2026-11-27T01:13:47.645+00:00','loopback','forget_set.enable','potter','{"assistant": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "calibration": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "gate": "vvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv", "phrases": "pppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppp", "similarity": "vvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv"}','b01b206305248f1a51ab26c63696f51c85fa8cb537e2b054240c4fef60b61710','a739e27574f3c2c33cd6504effff57fc52c523af20181e5b99d49db4c7d5b613');
INSERT INTO "audit" VALUES(6,'2026-11-27T01:13:47.663+00:00','loopback','policy.put','strict','{"name": "strict", "description": "", "forget_sets": ["potter"], "guards": {"gate": {"enabled": true, "on_hit": "refuse", "threshold": null, "pasted": "counts"}, "stream": null, "contrast": {"enabled": true, "rule": "uld", "alpha": null, "margin": 4.0, "plausibility": 0.01}, "suppression": {"enabled": true}, "steering": [], "corrupt": null}, "on_hit": "unlearn", "refusal": "I cannot continue this answer."}','a739e27574f3c2c33cd6504effff57fc52c523af20181e5b99d49db4c7d5b613','cf8126455c87965390cd99d1941d8389f85a03edd4a7bccb2eada183ecadf3bd');
INSERT INTO "audit" VALUES(7,'2026-11-27T01:13:47.675+00:00','lethe key','key.create','key-f98cf73f','{"scope": "admin", "label": "ops", "requests_per_minute": 5}','cf8126455c87965390cd99d1941d8389f85a03edd4a7bccb2eada183ecadf3bd','559197ecc0fbf7d15429700b83c6a95912e0b1c31238de4b85460b849c7a471b');
CREATE TABLE experiments (
	name VARCHAR NOT NULL, 
	content VARCHAR NOT NULL, 
	PRIMARY KEY (name)
);
CREATE TABLE forget_sets (
	name VARCHAR NOT NULL, 
	header JSON NOT NULL, 
	content VARCHAR NOT NULL, 
	enabled_at VARCHAR, 
	created_at VARCHAR NOT NULL, 
	updated_at VARCHAR NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "forget_sets" VALUES('potter','{"fingerprint": "3a67c42f7c309c74ab5cbcc8d9fe5aa62393499a4f0af12be3d8466e4bdb4810", "description": "", "phrases": 1, "aliases": 1, "questions": 1, "texts": 0, "requester": "", "legal_basis": "", "expires_at": null}','{"name":"potter","description":"","phrases":["Hogwarts"],"aliases":["Harry Potter"],"questions":[{"question":"Which school?","answer":"Hogwarts.","paraphrases":[]}],"texts":[],"case_sensitive":false,"word_boundary":false,"match":"folded","requester":"","legal_basis":"","expires_at":null}','2026-11-27T01:13:47.642+00:00','2026-11-27T01:13:47.553+00:00','2026-11-27T01:13:47.553+00:00');
CREATE TABLE keys (
	id VARCHAR NOT NULL, 
	digest VARCHAR NOT NULL, 
	scope VARCHAR NOT NULL, 
	label VARCHAR NOT NULL, 
	created_at VARCHAR NOT NULL, 
	limits JSON, 
	PRIMARY KEY (id), 
	UNIQUE (digest)
);
INSERT INTO "keys" VALUES('key-f98cf73f','a0888cb6f21dbaae376ea6918c0e1e12777d4219379b1c7611b8613f8d03e81f','admin','ops','2026-11-27T01:13:47.673+00:00','{"requests_per_minute": 5}');
CREATE TABLE policies (
	name VARCHAR NOT NULL, 
	content VARCHAR NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "policies" VALUES('strict','{"name":"strict","description":"","forget_sets":["potter"],"guards":{"gate":{"enabled":true,"on_hit":"refuse","threshold":null,"pasted":"counts"},"stream":null,"contrast":{"enabled":true,"rule":"uld","alpha":null,"margin":4.0,"plausibility":0.01},"suppression":{"enabled":true},"steering":[],"corrupt":null},"on_hit":"unlearn","refusal":"I cannot continue this answer."}');
CREATE TABLE schema (
	version INTEGER NOT NULL
);
INSERT INTO "schema" VALUES(3);
COMMIT;
