package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// buildMemory is the aim for peak memory of a build, in MB.
const buildMemory = 100

// buildMeasurements are builds. Where files matter, all engines see the same ones in a round, for the first time.
func buildMeasurements() []measurement {
	ms := []measurement{
		{name: "build-cached", target: 12, once: func(b *bench, e *engine, i int) (float64, error) {
			dir := b.context("cached")
			if i == 0 {
				err := writeContext(dir, "FROM "+image+"\nENV A=1\nLABEL b=2\nWORKDIR /app\nCOPY a.txt .\nRUN echo one > /one\nRUN echo two > /two\nCOPY b.txt .\n"+
					"RUN echo three > /three\nEXPOSE 80\nCMD [\"true\"]\n", "a.txt", "b.txt")
				if err != nil {
					return 0, err
				}
			}
			return e.timed(e.build("bench-cached", dir)...)
		}},
		{name: "build-run-step", target: 25, once: func(b *bench, e *engine, i int) (float64, error) {
			dir := b.context("runstep." + e.name)
			if err := writeDockerfile(dir, fmt.Sprintf("FROM %s\nRUN echo %d %d > /n\n", image, i, time.Now().UnixNano())); err != nil {
				return 0, err
			}
			return e.timed(e.build("bench-run", dir)...)
		}},
		{name: "build-last-copy", target: 25, once: func(b *bench, e *engine, i int) (float64, error) {
			dir := b.context("copy." + e.name)
			text := "FROM " + image + "\n" + strings.Repeat("ENV A=1\n", 3) + "RUN true\nCOPY file /file\n"
			if err := writeDockerfile(dir, text); err != nil {
				return 0, err
			}
			if err := os.WriteFile(filepath.Join(dir, "file"), fmt.Append(nil, i, time.Now().UnixNano()), 0o644); err != nil {
				return 0, err
			}
			return e.timed(e.build("bench-copy", dir)...)
		}},
		{name: "build-stages", target: 1080, rounds: 3, once: func(b *bench, e *engine, i int) (float64, error) {
			dir := b.context("stages." + e.name)
			text, last := "", "FROM "+image+"\n"
			for k := range 4 {
				text += fmt.Sprintf("FROM %s AS s%d\nRUN sleep 1; echo %d > /n%d\n", image, k, time.Now().UnixNano(), k)
				last += fmt.Sprintf("COPY --from=s%d /n%d /\n", k, k)
			}
			if err := writeDockerfile(dir, text+last); err != nil {
				return 0, err
			}
			return e.timed(e.build("bench-stages", dir)...)
		}},
		{name: "build-copy-20000", target: 2500, rounds: 3, once: withFiles(func(b *bench, e *engine, dir string, _ int) (float64, error) {
			return e.timed(e.build("bench-files", dir)...)
		})},
		{name: "build-copy-same", target: 120, once: func(b *bench, e *engine, i int) (float64, error) {
			dir, err := b.files(0)
			if err != nil {
				return 0, err
			}
			return e.timed(e.build("bench-files", dir)...)
		}},
		{name: "build-copy-one", target: 1500, rounds: 3, once: func(b *bench, e *engine, i int) (float64, error) {
			dir, err := b.files(0)
			if err != nil {
				return 0, err
			}
			if i == 0 {
				err = e.do(e.build("bench-files", dir)...)
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, "tree", "d50", "f100"), fmt.Append(nil, i, e.name, time.Now().UnixNano()), 0o644)
			}
			if err != nil {
				return 0, err
			}
			b.settle()
			return e.timed(e.build("bench-files", dir)...)
		}},
		{name: "build-copy-1GB", target: 3000, rounds: 3, once: withGigabyte((*engine).timed)},
		{name: "build-memory-20000", target: buildMemory, memory: true, rounds: 1, once: withFiles(func(b *bench, e *engine, dir string, i int) (float64, error) {
			return e.peak(e.build("bench-files", dir)...)
		})},
		{name: "build-memory-1GB", target: buildMemory, memory: true, rounds: 1, once: withGigabyte((*engine).peak)},
	}
	for i := range ms {
		ms[i].build = true
	}
	return ms
}

// build is the command line of a quiet build of the folder dir.
func (e *engine) build(tag, dir string) []string {
	if e.name == "buildkit" {
		args := []string{"build", "--progress", "plain", "--frontend", "dockerfile.v0", "--local", "context=" + dir, "--local", "dockerfile=" + dir}
		return append(append(args, e.base...), "--output", "type=image,name=docker.io/library/"+tag)
	}
	return []string{"build", "-q", "-t", tag, dir}
}

// forget removes what a build has made. Called only for what lies in few files: a mass deletion slows the file system down for a while.
func (e *engine) forget(tag string) error {
	switch e.name {
	case "buildkit":
		return e.do("prune", "--all")
	case "conex":
		if err := e.do("rmi", "-f", tag); err != nil {
			return err
		}
		return e.do("builder", "prune", "-af")
	}
	return e.do("rmi", "-f", tag)
}

// withFiles gives a measurement 20,000 files that no engine has seen. They stay until the end.
func withFiles(once func(b *bench, e *engine, dir string, i int) (float64, error)) func(*bench, *engine, int) (float64, error) {
	var sets []int // by round
	return func(b *bench, e *engine, i int) (float64, error) {
		if i == len(sets) {
			b.fileSets++
			sets = append(sets, b.fileSets)
		}
		dir, err := b.files(sets[i])
		if err != nil {
			return 0, err
		}
		b.settle()
		return once(b, e, dir, i)
	}
}

// files is a context of 20,000 files of 10,000 bytes in 100 folders. Each set has contents of its own.
func (b *bench) files(set int) (string, error) {
	dir := b.context(fmt.Sprintf("files.%d", set))
	tree := filepath.Join(dir, "tree")
	if _, err := os.Stat(tree); err == nil {
		return dir, nil
	}
	random := rand.NewChaCha8([32]byte{1, byte(set)})
	data := make([]byte, 10_000)
	for d := range 100 {
		folder := filepath.Join(tree, fmt.Sprintf("d%02d", d))
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return "", err
		}
		for f := range 200 {
			random.Read(data)
			if err := os.WriteFile(filepath.Join(folder, fmt.Sprintf("f%03d", f)), data, 0o644); err != nil {
				return "", err
			}
		}
	}
	return dir, writeDockerfile(dir, "FROM "+image+"\nCOPY tree /tree\n")
}

// withGigabyte measures a build that copies a file of 1 GB, which differs in each build by its first bytes.
func withGigabyte(measure func(e *engine, args ...string) (float64, error)) func(*bench, *engine, int) (float64, error) {
	return func(b *bench, e *engine, i int) (float64, error) {
		dir := b.context("gigabyte")
		file := filepath.Join(dir, "file")
		if _, err := os.Stat(file); err != nil {
			if err := writeDockerfile(dir, "FROM "+image+"\nCOPY file /file\n"); err != nil {
				return 0, err
			}
			if err := writeRandom(file, 1<<30); err != nil {
				return 0, err
			}
		}
		f, err := os.OpenFile(file, os.O_WRONLY, 0)
		if err != nil {
			return 0, err
		}
		_, err = f.WriteAt(fmt.Append(nil, i, e.name, time.Now().UnixNano()), 0)
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return 0, err
		}
		b.settle()
		v, err := measure(e, e.build("bench-gigabyte", dir)...)
		return then(v, err, func() error { return e.forget("bench-gigabyte") })
	}
}

func writeRandom(path string, size int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	random := rand.NewChaCha8([32]byte{3})
	data := make([]byte, 1<<20)
	for range size / len(data) {
		random.Read(data)
		if _, err := f.Write(data); err != nil {
			return err
		}
	}
	return f.Close()
}

// writeContext makes a folder with a Dockerfile and small files.
func writeContext(dir, dockerfile string, files ...string) error {
	if err := writeDockerfile(dir, dockerfile); err != nil {
		return err
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(dir, f), []byte(f), 0o644); err != nil {
			return err
		}
	}
	return nil
}
