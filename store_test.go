package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// These tests hold the store to the promise at the top of store.go. They keep a plain model of what was acknowledged:
// whatever happens, the contents of the store must be the same text. And they make everything fail that can: FILE is
// damaged, the power is lost, an operation on the disk fails (the type disk is the seam), and the server, in a
// process of its own, is killed.

var long = flag.Bool("long", false, "kill the server many times, which takes minutes")

// TestFormat shows FILE after a stop, one change per line, and after two commits.
func TestFormat(t *testing.T) {
	s := newTestStore(t, noSync)
	ann := somebody(1)
	s.must(ann.signUp("a@example.org"), ann.create(ideaID(1), "tea & milk", 7))
	s.must(ann.logIn("phone", 10), ann.logOut("user00001-0", 0))
	s.restart()
	s.must(ann.update(ideaID(1), "tea", 5))
	s.commitInOneLine(ann.remove(ideaID(1)), somebody(2).signUp("b@example.org"))
	compare(t, "FILE", s.file(), withChecksums(`{"format":2,"last_id":"user00001","changes":[
{"user":{"id":"user00001","email":"a@example.org","name":"Any Name","password":"hash"}},
{"session":{"key":"phone","user":"user00001","start":10,"expires":110}},
{"create":{"owner":"user00001","idea":{"id":"idea00001","content":"tea \u0026 milk","impact":7,"ease":5,"confidence":5,"average_score":5.666666666666667,"created_at":1600000000}}},
{"logout":{"user":"user00001","exp":4102444800}}
]`, `{"changes":[{"update":{"owner":"user00001","idea":{"id":"idea00001","content":"tea","impact":5,"ease":5,"confidence":5,"average_score":5.0,"created_at":1600000000}}}]`,
		`{"changes":[{"delete":{"owner":"user00001","id":"idea00001"}},`+
			`{"user":{"id":"user00002","email":"b@example.org","name":"Any Name","password":"hash"},"session":{"key":"user00002-0","user":"user00002","start":1,"expires":101}}]`))
}

// TestEveryKindHasAnExample fails for a kind of change that the other tests do not make.
func TestEveryKindHasAnExample(t *testing.T) {
	var m model
	m.do(somebody(1).signUp("a@example.org"))
	var random []change
	r := rand.New(rand.NewPCG(1, 0))
	for n := range 200 {
		random = append(random, randomChange(r, &m, func() string { return ideaID(n) }))
		m.do(random[n])
	}
	for name, changes := range map[string][]change{
		"everyChange": somebody(1).everyChange(), "randomChange": random, "script": slices.Concat(script()...),
	} {
		for _, field := range reflect.VisibleFields(reflect.TypeFor[change]()) {
			has := func(c change) bool { return !reflect.ValueOf(c).FieldByIndex(field.Index).IsZero() }
			if field.IsExported() && field.Name != "Probe" && !slices.ContainsFunc(changes, has) {
				t.Errorf("%s has no example of %s", name, field.Name)
			}
		}
	}
}

// TestAPlainModelAgrees makes thousands of random changes, many of which must be rejected, and restarts
// now and then. The directory cannot be synced, as on CIFS and in shared folders.
func TestAPlainModelAgrees(t *testing.T) {
	for _, errno := range []error{syscall.EINVAL, syscall.ENOTSUP} {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		r := rand.New(rand.NewPCG(seed, 0))
		s := newTestStore(t, func(op, path string, do func() error) error {
			if op == "sync" && !strings.HasPrefix(filepath.Base(path), dataName) {
				return &fs.PathError{Op: op, Path: path, Err: errno}
			}
			return noSync(op, path, do)
		})
		s.must(person(s.newID()).signUp("first@example.org"))
		for n := range 2000 {
			c := randomChange(r, &s.model, s.newID)
			wantError(t, inJSON(c), s.commit(c), s.model.do(c))
			if n%500 == 499 {
				s.restart()
			}
			if n%50 == 49 {
				s.survivesAKill(fmt.Sprintf("after change %d", n))
			}
		}
	}
}

// TestIDsRiseAndNeverRepeat asks for ids in the year 2000, where the clock of synctest begins.
func TestIDsRiseAndNeverRepeat(t *testing.T) {
	s := newTestStore(t, noSync)
	check := func(last string, left files) {
		synctest.Test(t, func(t *testing.T) {
			path := scratch(t)
			left.write(t, path)
			s := mustOpen(t, path, nil)
			ids := []string{last, s.newID(), s.newID(), s.newID()}
			if !slices.IsSorted(ids) || len(slices.Compact(ids)) < 4 || !idShape.MatchString(ids[3]) {
				t.Errorf("got the ids %v, want them to rise", ids)
			}
		})
	}
	p, gone := person(s.newID()), s.newID()
	s.must(p.signUp("a@example.org"))
	check(string(p), readFiles(t, s.path))
	s.must(p.create(gone, "tea", 5), p.remove(gone))
	for range 3 {
		check(gone, readFiles(t, s.path))
		s.restart()
	}
	check(gone, files{dataName: checksum.ReplaceAllString(s.file(), "")})
}

// TestSessionsThatEnd logs in again and again, each time for 100 seconds. A login ends the sessions that have expired,
// judged by the times in the changes (by today's clock, all have expired), and the oldest of more than a hundred.
func TestSessionsThatEnd(t *testing.T) {
	s := newTestStore(t, noSync)
	ann, bob := somebody(1), somebody(2)
	s.must(ann.signUp("a@example.org"), bob.signUp("b@example.org"))
	seconds := append([]int64{2, 3, 50, 100, 101, 102, 103}, slices.Repeat([]int64{104}, 102)...)
	for n, second := range seconds {
		s.must(ann.logIn(fmt.Sprint("key ", n), second))
		s.survivesAKill(fmt.Sprintf("after login %d", n)) // a start ends the same
	}
	compare(t, "the number of sessions", len(s.accounts[string(ann)].sessions), 100)
	s.must(bob.logOut("key 108", 0)) // ends nothing: it is somebody else's
	s.survivesAKill("after somebody else's logout")
}

// TestLogoutsLast follows an access token that was logged out, until a day after it expired.
func TestLogoutsLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestStore(t, noSync)
		ann := somebody(1)
		token := tokenID{string(ann), time.Now().Unix() + 600}
		s.must(ann.signUp("a@example.org"), change{Logout: &logout{tokenID: token, Key: string(ann) + "-0"}})
		check := func(when string, lasts bool) {
			t.Helper()
			_, active := s.activeUser(token)
			if inFile := strings.Contains(s.file(), "logout"); active == lasts || inFile != lasts {
				t.Errorf("%s: got an active token: %t, a logout in FILE: %t", when, active, inFile)
			}
			s.survivesAKill(when)
		}
		check("at first", true)
		s.restart()
		check("after a restart", true)
		if expires, ok := s.freeExpiry(string(ann), time.Now().Unix(), token.Expires); expires != token.Expires-1 || !ok {
			t.Errorf("the next token expires at %d (%t), want the second before %d", expires, ok, token.Expires)
		}
		time.Sleep(600*time.Second + 24*time.Hour)
		s.compact()
		check("after a compaction, a day after it expired", true)
		time.Sleep(time.Second)
		check("more than a day after it expired", true)
		s.model.loggedOut = nil
		s.compact()
		check("after a compaction", false)
	})
}

// TestAStopLeavesOneDocument has enough data to reveal a random order.
func TestAStopLeavesOneDocument(t *testing.T) {
	s := newTestStore(t, noSync)
	for n := range 20 {
		p := somebody(n)
		s.must(p.signUp(string(p)+"@example.org"), p.logIn(string(p)+"-1", 2), p.logOut("", int64(-n)), p.logOut("", int64(n)))
		s.must(p.create(ideaID(n), "tea", 1+n%10), p.create(ideaID(n+100), "tea", 1+n%7))
	}
	s.restart()
	first, again := s.file(), somebody(1).logOut("", 1)
	s.must(again) // so the next stop writes a new one
	wantError(t, "a stop", s.close(), nil)
	wantError(t, "a change after it", s.commit(again), errNotSaved)
	compare(t, "FILE after another stop", s.file(), first)
	if left := readFiles(t, s.path); len(left) != 1 || !json.Valid([]byte(first)) {
		t.Errorf("a stop leaves %q", left)
	}
}

// TestABackup copies FILE while 16 people write and the store compacts. A copy holds what was acknowledged
// before, and only what was written. Finally, one is restored.
func TestABackup(t *testing.T) {
	s := newTestStore(t, noSync)
	var writers crowd
	for n := range 16 {
		writers.join(s, somebody(n), func(created int) bool {
			if created%10 == 0 && runtime.GOOS != "windows" { // which renames no open file
				s.compactSoon()
			}
			return created < 100
		})
	}
	path := scratch(t)
	var before []string
	var copies []files
	for n := range 30 {
		acknowledged := writers.acknowledged()
		for strings.Count(acknowledged, "\n") < 50*n {
			runtime.Gosched()
			acknowledged = writers.acknowledged()
		}
		copyFile(t, s.path, path)
		before, copies = append(before, acknowledged), append(copies, readFiles(t, path))
	}
	writers.Wait()
	abandon(s.store)
	written := contents(s.store)
	for n, f := range copies {
		dec, err := json.NewDecoder(strings.NewReader(f[dataName])), error(nil)
		for err == nil {
			err = dec.Decode(new(any)) // as jq does
		}
		if err != io.EOF && err != io.ErrUnexpectedEOF { // a copy may end within a line
			t.Errorf("a copy is not a sequence of JSON values: %v", err)
		}
		state := f.read(t, s.scratch)
		checkHolds(t, "a copy", state, before[n])
		checkHolds(t, "nobody wrote what a copy holds: the store", written, state)
	}
	copyFile(t, path, s.path)
	compare(t, "with a copy in place of FILE", contents(mustStart(t, s.path, noSync)), copies[29].read(t, path))
}

// A crowd creates ideas, everybody at the same time, and knows what was acknowledged.
type crowd struct {
	sync.WaitGroup
	mu    sync.Mutex
	lines []string // in the words of a model
}

// join has a person sign up, and create ideas as long as goOn allows it.
func (c *crowd) join(s *testStore, p person, goOn func(created int) bool) {
	commit := func(made change) {
		wantError(s.t, inJSON(made), s.commit(made), nil)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.lines = append(c.lines, after(made))
	}
	c.Go(func() {
		commit(p.signUp(string(p) + "@example.org"))
		for n := 0; goOn(n); n++ {
			commit(p.create(s.newID(), "tea", 5))
		}
	})
}

func (c *crowd) acknowledged() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.lines, "")
}

func checkHolds(t *testing.T, name, state, part string) {
	t.Helper()
	lines := make(map[string]bool)
	for line := range strings.Lines(state) {
		lines[line] = true
	}
	for line := range strings.Lines(part) {
		if !lines[line] {
			t.Errorf("%s lacks %s", name, line)
		}
	}
}

// TestMemoryOfALogout allows 60 bytes for each access token: no copy of the user id.
func TestMemoryOfALogout(t *testing.T) {
	const logouts, limit = 100_000, 60
	m := newMemory()
	wantError(t, "a sign-up", m.apply(somebody(1).signUp("a@example.org")), nil)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for n := range logouts {
		wantError(t, "a logout", m.apply(somebody(1).logOut("", int64(n))), nil)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if each := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / logouts; each > limit {
		t.Errorf("got %d bytes of memory for each logout, want at most %d", each, limit)
	}
	runtime.KeepAlive(m)
}

// TestUnusableFiles puts things other than a damaged file in the place of FILE.
func TestUnusableFiles(t *testing.T) {
	content := func(data string) func(string) error {
		return func(path string) error { return os.WriteFile(path, []byte(data), 0o600) }
	}
	const empty = header + "\n]"
	const regular, newer = "not a regular file", "; use the newer version"
	const foreign = "not a data file of ideapool; choose another path"
	for _, test := range []struct {
		name   string
		create func(path string) error
		error  string
	}{
		{"empty", content(""), "empty; restore a backup, or remove it"},
		{"blank", content("\n\n"), "empty; restore a backup, or remove it"},
		{"of format 1", content(`{"format":1,"store":"x","users":[],"crc32c":"00000000"}`), "an older version"},
		{"of format 3", content(`{"format":3,"pages":[]}`), "a newer version"},
		{"of format 3 in lines", content(withChecksums(strings.Replace(empty, "2", "3", 1), `{"changes":[7]`)), "a newer version"},
		{"with an unknown field", content(withChecksums(header + `{"user":{"id":"user00001","mood":7}}` + "\n]")), `line 2: unknown field "mood"` + newer},
		{"with an unknown kind of change", content(withChecksums(empty, `{"changes":[{"archive":{}}]`)), `line 4: unknown field "archive"` + newer},
		{"an object", content("{}"), foreign},
		{"null", content("null"), foreign},
		{"an array", content("[]"), "damaged"},
		{"JSON of something else", content(`{"foo":1}`), "foo"},
		{"text", content("Dear diary"), "damaged"},
		{"a directory", func(path string) error { return os.Mkdir(path, 0o700) }, regular},
		{"a named pipe", func(path string) error { return exec.Command("mkfifo", path).Run() }, regular},
		{"a device", func(path string) error { return symlink(os.DevNull, path) }, regular},
		{"in use", func(path string) error { return mustStart(t, path, noSync).check() }, errLocked.Error()},
		{"in use, under another name", func(path string) error {
			return errors.Join(mustStart(t, path+"2", noSync).check(), symlink(path+"2", path))
		}, errLocked.Error()},
		{"a dangling link", func(path string) error { return symlink("nothing", path) }, ""},
		{"next to FILE.tmp that cannot be removed", func(path string) error { return os.MkdirAll(path+".tmp/x", 0o700) }, "remove it by hand"},
		{"in a directory that does not exist", func(path string) error { return os.RemoveAll(filepath.Dir(path)) }, ""},
		{"in a file", func(path string) error {
			return errors.Join(os.RemoveAll(filepath.Dir(path)), content("")(filepath.Dir(path)))
		}, ""},
	} {
		directory := filepath.Join(t.TempDir(), "directory")
		path := filepath.Join(directory, dataName)
		err := errors.Join(os.Mkdir(directory, 0o700), os.WriteFile(path+".lock", nil, 0o600), test.create(path))
		if runtime.GOOS == "windows" && (err != nil || test.error == errLocked.Error()) {
			continue // it has no locks and no pipes, and not everybody may make links
		}
		before := filesIn(filepath.Dir(directory))
		s, err := openStore(path, nil, quiet)
		if err == nil {
			err = s.start()
			abandon(s)
		}
		if err == nil || !strings.Contains(err.Error(), test.error) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got the error %q, want one line with %q", test.name, err, test.error)
		}
		compare(t, test.name+", the files", filesIn(filepath.Dir(directory)), before)
	}
}

// TestLockErrors blames another process only if there is one.
func TestLockErrors(t *testing.T) {
	for _, err := range []error{syscall.ENOSYS, syscall.ENOLCK, syscall.ENOTSUP, syscall.EWOULDBLOCK} {
		got, locked := lockError(err), err == syscall.EWOULDBLOCK
		if errors.Is(got, errLocked) != locked || errors.Is(got, err) == locked {
			t.Errorf("%v: got the error %v", err, got)
		}
	}
}

// TestTemporaryFilesAreNew puts other things in the place of FILE.tmp first.
func TestTemporaryFilesAreNew(t *testing.T) {
	for name, create := range map[string]func(victim, path string) error{
		"a file":                func(_, path string) error { return os.WriteFile(path, []byte("an older one"), 0o644) },
		"an empty directory":    func(_, path string) error { return os.Mkdir(path, 0o700) },
		"a link":                os.Symlink,
		"a hard link":           os.Link,
		"a link to nothing":     func(victim, path string) error { return symlink(victim+"2", path) },
		"a link to a directory": func(victim, path string) error { return symlink(filepath.Dir(victim), path) },
	} {
		path, victim := scratch(t), filepath.Join(t.TempDir(), "victim")
		if err := errors.Join(os.WriteFile(victim, []byte("mine"), 0o600), create(victim, path+".tmp")); err != nil {
			t.Logf("%s: %v", name, err) // not everybody may make links on Windows
			continue
		}
		mustStart(t, path, nil)
		names := must(os.ReadDir(filepath.Dir(victim)))
		if data := must(os.ReadFile(victim)); string(data) != "mine" || len(names) != 1 {
			t.Errorf("%s: wrote %q through it, among %v", name, data, names)
		}
		for _, path := range []string{path, path + ".lock"} {
			if info, err := os.Lstat(path); runtime.GOOS != "windows" && (err != nil || info.Mode() != 0o600) {
				t.Errorf("%s: %s has another mode than 0600 (%v)", name, path, err)
			}
		}
	}
}

// TestRivals lets eight sign-ups with one e-mail compete, and then two deletes of an idea among updates: one of each
// wins.
func TestRivals(t *testing.T) {
	s := newTestStore(t, noSync)
	compete := func(loss error, rivals ...change) {
		t.Helper()
		var winner atomic.Pointer[change]
		atOnce(len(rivals), func(n int) {
			err := s.commit(rivals[n])
			if err != nil {
				wantError(t, "the loser", err, loss)
			} else if rivals[n].Update == nil && winner.Swap(&rivals[n]) != nil {
				t.Error("two rivals won")
			}
		})
		if winner.Load() == nil {
			t.Fatal("nobody won")
		}
		s.model.do(*winner.Load())
		s.survivesAKill("after rivals")
	}
	for n := range 30 {
		email := fmt.Sprintf("someone%d@example.org", n)
		var signUps []change
		for range 4 {
			signUps = append(signUps, person(s.newID()).signUp(email), person(s.newID()).signUp(strings.ToUpper(email)))
		}
		compete(errEmailTaken, signUps...)

		id, p := s.newID(), person(s.model.users[n].ID)
		s.must(p.create(id, "tea", 5))
		update := func() change { return p.update(id, "coffee", 6) }
		compete(errNoIdea, update(), p.remove(id), update(), update(), p.remove(id), update())
		wantError(t, "an update after the delete", s.commit(update()), errNoIdea)
	}
}

// TestManyAtOnceDuringCompactions lets eight people make random changes, each with a model, while others read and the
// store compacts.
func TestManyAtOnceDuringCompactions(t *testing.T) {
	s, models := newTestStore(t, noSync), make([]model, 8)
	atOnce(len(models), func(n int) {
		p, mine, r := person(s.newID()), &models[n], rand.New(rand.NewPCG(uint64(n), 0))
		signUp := p.signUp(string(p) + "@example.org")
		wantError(t, "a sign-up", s.commit(signUp), mine.do(signUp))
		var reader sync.WaitGroup
		var done atomic.Bool
		reader.Go(func() { readPages(t, s.store, string(p), &done) })
		for n := range 1000 {
			c := randomChange(r, mine, s.newID)
			wantError(t, inJSON(c), s.commit(c), mine.do(c))
			if n%10 == 0 {
				s.compactSoon()
			}
		}
		done.Store(true)
		reader.Wait()
	})
	for _, m := range models {
		s.model.users = append(s.model.users, m.users...)
		s.model.sessions = append(s.model.sessions, m.sessions...)
		s.model.ideas = append(s.model.ideas, m.ideas...)
		s.model.loggedOut = append(s.model.loggedOut, m.loggedOut...)
	}
	s.restart()
	s.survivesAKill("after a restart")
}

// readPages checks that a page is in order and full, while there is no telling which ideas it has.
func readPages(t *testing.T, s *store, owner string, done *atomic.Bool) {
	byAverage := func(a, b idea) int { return -cmp.Compare(a.Average, b.Average) }
	for page := 1; !done.Load(); page = page%3 + 1 {
		list, total := s.pageOfIdeas(owner, page)
		var ideas []idea
		err := json.Unmarshal(list, &ideas)
		if err != nil || len(ideas) != min(pageSize, max(0, total-(page-1)*pageSize)) || !slices.IsSortedFunc(ideas, byAverage) {
			t.Errorf("page %d of %d ideas has %d, or is out of order (%v)", page, total, len(ideas), err)
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// TestChangesShareAnFsync lets 64 people come one after the other. The first must wait for those who follow.
func TestChangesShareAnFsync(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	var syncs atomic.Int32
	s := newTestStore(t, func(op, path string, do func() error) error {
		if op == "sync" {
			syncs.Add(1)
		}
		return noSync(op, path, do) // takes no time in which others could join
	})
	s.must(somebody(1).signUp("a@example.org"))
	syncs.Store(0)
	atOnce(64, func(n int) {
		for range n % 4 {
			runtime.Gosched()
		}
		wantError(t, "a create", s.commit(somebody(1).create(ideaID(n), "tea", 5)), nil)
	})
	if n := syncs.Load(); n > 3 {
		t.Errorf("64 changes at once took %d fsyncs", n)
	}
}

// TestNobodySeesWhatIsNotOnDisk makes a change of each kind. Before each operation, it gives waiting callers time to
// go on, and then checks the store.
func TestNobodySeesWhatIsNotOnDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake, ops, s := newFakeDisk(), []string(nil), (*testStore)(nil)
		s = newTestStore(t, func(op, path string, do func() error) error {
			if ops = append(ops, op); s != nil {
				time.Sleep(time.Nanosecond) // by the clock of synctest
				s.agrees("before a " + op)
			}
			return fake.step(op, path, do)
		})
		ann := somebody(1)
		s.must(ann.signUp("a@example.org"), ann.create(ideaID(1), "tea", 5))
		for _, c := range ann.everyChange() {
			before := s.model.String()
			ops = nil
			s.must(c)
			compare(t, "after a power loss", fake.after("a power loss").left().read(t, s.scratch), s.model.String())
			time.Sleep(time.Second) // if the store has not finished, let it
			s.survivesAKill("after " + inJSON(c))
			compare(t, inJSON(c), ops, []string{"write", "sync"})
			if contents(s.store) == before {
				t.Errorf("%s changes nothing", inJSON(c))
			}
		}
	})
}

// Recovery: what was never acknowledged is dropped. Other damage is rejected, and nothing is touched.

// TestFileCutAnywhere opens every prefix of FILE. Each holds its whole commits, and no part of the next.
func TestFileCutAnywhere(t *testing.T) {
	values, states := example(t)
	file, inSnapshot := strings.Join(values, ""), strings.Count(values[0], "\n")
	path, next, snapshot := scratch(t), scratch(t), len(values[0])-1 // without its newline
	for cut := range len(file) + 1 {
		name, prefix := fmt.Sprintf("cut at byte %d", cut), files{dataName: file[:cut]}
		if cut < snapshot {
			prefix.rejected(t, path, name, "")
			continue
		}
		lines, torn := max(strings.Count(file[:cut], "\n"), inSnapshot), 0
		if cut > snapshot && file[cut-1] != '\n' {
			torn = lines + 1
		}
		prefix.write(t, path)
		s := mustOpen(t, path, noSync)
		compare(t, name+", the incomplete line", s.torn, torn)
		compare(t, name, contents(s), states[lines-inSnapshot])
		if cut%5 == snapshot%5 { // a start is slow
			wantError(t, name, s.start(), nil)
			started := readFiles(t, path)
			if !json.Valid([]byte(started[dataName])) {
				t.Errorf("%s: a start leaves %q", name, started)
			}
			compare(t, name+", after a start", started.read(t, next), states[lines-inSnapshot])
			wantError(t, name, s.commit(somebody(9).signUp("late@example.org")), nil)
			compare(t, name+", after a change", readFiles(t, path).read(t, next), contents(s))
		}
		abandon(s)
	}
}

// TestWarnings starts the server with an incomplete last line in FILE, and with a key that others can read.
func TestWarnings(t *testing.T) {
	path, want := scratch(t), []string{"line=3", "run chmod 600 on it"}
	if runtime.GOOS == "windows" { // it has no modes
		want = want[:1]
	}
	files{dataName: withChecksums(header+"]") + "{"}.write(t, path)
	p := startProcess(t, path, "-quiet")
	for _, text := range want {
		if line := must(p.log.ReadString('\n')); !strings.Contains(line, text) {
			t.Errorf("got the warning %s, want one with %q", line, text)
		}
	}
}

// TestAFlippedBitIsRejected flips every bit of FILE, except in the last newline: without that a line is torn.
func TestAFlippedBitIsRejected(t *testing.T) {
	values, _ := example(t)
	file, path := strings.Join(values, ""), scratch(t)
	for at := range len(file) - 1 {
		place := "" // in the snapshot, another line may show it
		if at >= len(values[0]) {
			place = fmt.Sprintf("line %d: ", 1+strings.Count(file[:at], "\n"))
		}
		for bit := range 8 {
			flipped := []byte(file)
			flipped[at] ^= 1 << bit
			files{dataName: string(flipped)}.rejected(t, path, fmt.Sprintf("bit %d of byte %d flipped", bit, at), place)
		}
	}
}

// TestALostBlock puts zeros where a block was lost. In the last line that is no damage: it was not fsynced.
func TestALostBlock(t *testing.T) {
	values, states := example(t)
	last, path := len(values)-1, scratch(t)
	for at, value := range values {
		n := len(value)
		for _, lost := range [][2]int{{0, 1}, {0, n / 2}, {n / 3, n / 2}, {n - 3, n - 1}, {0, n}, {n / 2, n}, {n - 1, n}} {
			damaged := slices.Clone(values)
			damaged[at] = value[:lost[0]] + strings.Repeat("\x00", lost[1]-lost[0]) + value[lost[1]:]
			f := files{dataName: strings.Join(damaged, "")}
			name := fmt.Sprintf("value %d of %d without the bytes %d", at+1, len(values), lost)
			if at == last {
				compare(t, name, f.read(t, path), states[last-1])
			} else if at < last-1 || lost[1] < n { // else it is one line with the last
				f.rejected(t, path, name, "")
			}
		}
	}
}

// TestLinesOutOfPlace puts whole lines where they do not belong.
func TestLinesOutOfPlace(t *testing.T) {
	values, states := example(t)
	foreign, _ := example(t, somebody(3).signUp("c@example.org"))
	path, last := scratch(t), len(values)-1
	// check replaces values, so that there is a fault after the first good ones.
	check := func(name string, from, to, good int, others ...string) {
		t.Helper()
		changed := slices.Replace(slices.Clone(values), from, to, others...)
		place := fmt.Sprintf("line %d: ", strings.Count(strings.Join(values[:good], ""), "\n")+1)
		files{dataName: strings.Join(changed, "")}.rejected(t, path, name, place)
	}
	for n := 1; n <= last; n++ {
		check("a line twice", n, n, n+1, values[n])
		check("an empty line", n, n, n, "\n")
		check("a line of another file", n, n+1, n, foreign[n])
		check("the snapshot again", n, n, n, values[0])
		compare(t, "without the last lines", files{dataName: strings.Join(values[:n], "")}.read(t, path), states[n-1])
		if n < last {
			check("a line missing", n, n+1, n)
			check("lines swapped", n, n+2, n, values[n+1], values[n])
			check("a line moved to the end", n, last+1, n, append(slices.Clone(values[n+1:]), values[n])...)
		}
	}
	files{dataName: foreign[0] + values[1]}.rejected(t, path, "the snapshot of another file", errDamaged.Error())
	for line := range strings.Lines(values[0]) {
		files{dataName: strings.Replace(values[0], line, "", 1) + values[1]}.rejected(t, path, "without "+line, "")
		files{dataName: strings.Replace(values[0], line, line+line, 1)}.rejected(t, path, "twice "+line, "")
	}
}

// TestTheEndOfTheBuffer reads a line that ends where the read buffer ends, or is as long, with many lines after it.
func TestTheEndOfTheBuffer(t *testing.T) {
	ann := somebody(1)
	changes := []change{ann.signUp("a@example.org")}
	values := []string{header + inJSON(changes[0]) + "\n]", laterLine(change{Probe: "-"})}
	for n := range 1000 { // 150 bytes each
		changes = append(changes, ann.create(ideaID(n), "tea", 5))
		values = append(values, laterLine(changes[n+1]))
	}
	end := len(withChecksums(values[:2]...))
	for _, start := range []int{0, len(withChecksums(values[0]))} {
		for _, length := range []int{65535, 65536, 65537} {
			values[1] = laterLine(change{Probe: strings.Repeat("-", 1+start+length-end)})
			got := files{dataName: withChecksums(values...)}.read(t, scratch(t))
			compare(t, fmt.Sprintf("a line from %d to %d", start, start+length), got, after(changes...))
		}
	}
}

// TestChangesThatDoNotFit puts them in a line with the right checksum, which only a bug could write, and in a FILE
// that was edited by hand.
func TestChangesThatDoNotFit(t *testing.T) {
	values, _ := example(t)
	line, path := strings.Count(strings.Join(values, ""), "\n")+1, scratch(t)
	for n, value := range values {
		values[n] = value[:strings.LastIndex(value, `,"crc32c"`)]
	}
	for name, c := range map[string]change{
		"an idea without its user":   somebody(9).create(ideaID(9), "tea", 5),
		"an idea twice":              somebody(1).create(ideaID(1), "tea", 5),
		"a user twice":               {User: somebody(1).signUp("new@example.org").User},
		"a user with a short id":     person("u1").signUp("new@example.org"),
		"a user with no e-mail":      somebody(9).signUp(""),
		"a user with a bad e-mail":   somebody(9).signUp("b at example.org"),
		"a session twice":            somebody(1).logIn("user00001-0", 10),
		"a session without its user": somebody(9).logIn("key", 10),
		"a sign-up of somebody else": {User: somebody(9).signUp("new@example.org").User, Session: somebody(8).logIn("key", 1).Session},
		"a logout without its user":  somebody(9).logOut("key", 10),
		"nothing":                    {},
	} {
		f := files{dataName: withChecksums(append(values, laterLine(c))...)}
		f.rejected(t, path, name, fmt.Sprintf("line %d: ", line))
		f.rejected(t, path, name, errInconsistent.Error())
		f = files{dataName: strings.TrimSuffix(values[0], "]") + "," + inJSON(c) + "]}"}
		f.rejected(t, path, name+", by hand", errInconsistent.Error())
	}
}

func TestHandEdits(t *testing.T) {
	values, states := example(t)
	plain := checksum.ReplaceAllString(values[0], "")
	edit := func(from, to string) string { return strings.Replace(plain, from, to, 1) }
	indented := func(text string) string {
		var b bytes.Buffer
		err := json.Indent(&b, []byte(text), "", "  ")
		return must(b.String(), err)
	}
	var doc any
	json.Unmarshal([]byte(plain), &doc)
	sorted := string(must(json.Marshal(doc))) // keys in another order, and 5.0 turned into 5
	scored := edit(`"tea","impact":5`, `"tea","impact":8`)
	rescored := strings.Replace(states[0], `"tea","impact":5`, `"tea","impact":8`, 1)
	rescored = strings.Replace(rescored, `"average_score":5.0`, `"average_score":6.0`, 1)
	const tea, damage, invalid = `"tea","impact":5`, "damaged", "the id, the content or a score is invalid"
	for name, test := range map[string]struct{ file, want string }{
		"no crc32c":         {plain, states[0]},
		"no last newline":   {strings.TrimSpace(plain), states[0]},
		"keys sorted":       {sorted, states[0]},
		"sorted, indented":  {indented(sorted), states[0]},
		"a score":           {scored, rescored},
		"a score, indented": {indented(scored), rescored},
		"a score, and CRLF": {strings.ReplaceAll(scored, "\n", "\r\n"), rescored},
		"no last id":        {edit(`"last_id":"user00002",`, ""), states[0]},

		"a score, with crc32c":         {strings.Replace(values[0], tea, `"tea","impact":8`, 1), "remove crc32c"},
		"indented, with crc32c":        {indented(values[0]), "remove crc32c"},
		"a later line":                 {plain + values[1], damage},
		"something after it":           {plain + "{}", "something follows the first document"},
		"a missing comma":              {edit("},\n", "}\n"), damage},
		"an unknown field":             {edit(`"content"`, `"mood":7,"content"`), `unknown field "mood"`},
		"score 12":                     {edit(tea, `"tea","impact":12`), invalid},
		"score 0":                      {edit(tea, `"tea","impact":0`), invalid},
		"score 5.5":                    {edit(tea, `"tea","impact":5.5`), "5.5"},
		"no content":                   {edit(`"tea"`, `""`), invalid},
		"an id in capitals":            {edit("idea00001", "IDEA00001"), `idea "IDEA00001": ` + invalid},
		"a short id":                   {edit("idea00001", "idea1"), invalid},
		"an id of the year 2291":       {edit("idea00001", "zzzzzzzzz"), invalid},
		"an idea without an id":        {edit(`"id":"idea00001",`, ""), invalid},
		"an e-mail twice":              {edit("b@example.org", "A@EXAMPLE.ORG"), errEmailTaken.Error()},
		"null":                         {edit(`"changes":[`, `"changes":[null,`), "changes[0]: " + errInconsistent.Error()},
		"a last id that is too high":   {edit(`"last_id":"user00002"`, `"last_id":"zzzzzzzzzz"`), "last_id"},
		"an id that leaves no room":    {edit("idea00001", "yzzzzzzzz"), "the id yzzzzzzzz leaves no room for new ones; correct it"},
		"a last id that is no id":      {edit(`"last_id":"user00002"`, `"last_id":"a-b"`), "last_id"},
		"an update of an unknown idea": {edit(`"create":{"owner":"user00001"`, `"update":{"owner":"user00001"`), errNoIdea.Error()},
	} {
		path, edited := scratch(t), files{dataName: test.file}
		if test.want != states[0] && test.want != rescored {
			edited.rejected(t, path, name, test.want)
			continue
		}
		edited.write(t, path)
		compare(t, name, contents(mustStart(t, path, noSync)), test.want)
		compare(t, name+", after the start", readFiles(t, path).read(t, scratch(t)), test.want)
	}
}

// TestAnyOrder reads files of one user with many ideas, in a good order and a bad one.
func TestAnyOrder(t *testing.T) {
	ann := somebody(1)
	changes := []change{ann.signUp("a@example.org")}
	for n := range 20_000 {
		changes = append(changes, ann.create(ideaID(n), "tea", 1+n%10))
	}
	want := after(changes...)
	for _, order := range []string{"as created", "shuffled"} {
		var texts, lines []string
		for _, c := range changes {
			texts, lines = append(texts, inJSON(c)), append(lines, laterLine(c))
		}
		snapshot := header + strings.Join(texts, ",\n") + "\n]"
		lines[0] = header + texts[0] + "\n]"
		for form, file := range map[string]string{
			"a snapshot": withChecksums(snapshot), "many lines": withChecksums(lines...), "an edited file": snapshot + "}",
		} {
			compare(t, form+", "+order, files{dataName: file}.read(t, scratch(t)), want)
		}
		rand.Shuffle(len(changes)-1, func(a, b int) { changes[a+1], changes[b+1] = changes[b+1], changes[a+1] })
	}
}

// TestWhenToCompact counts logouts, which are outdated at once, until a compaction. In a snapshot they do not count.
func TestWhenToCompact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		compactions, fails := 0, false
		s := newTestStore(t, func(op, path string, do func() error) error {
			if op == "create" {
				compactions++
			}
			if op == "create" && fails {
				return errInjected
			}
			return noSync(op, path, do)
		})
		logOut := func() {
			s.must(somebody(1).logOut("", int64(len(s.model.loggedOut))))
			synctest.Wait()
		}
		check := func(when string, want int) {
			t.Helper()
			time.Sleep(time.Second)
			before := len(s.model.loggedOut)
			for compactions = 0; compactions == 0 && len(s.model.loggedOut) < 20_000; {
				logOut()
			}
			compare(t, when+", the logouts until a compaction", len(s.model.loggedOut)-before, want)
		}
		s.must(somebody(1).signUp("a@example.org"))
		const want = 1000 + 2*2 + 1 - 2 // there is a user and a session
		check("at first", want+1)       // they came in one change
		check("then", want)
		s.restart()
		check("after a restart", want)
		s.restart()
		var line []change
		for n := range 10 {
			line = append(line, somebody(1).logOut("", int64(-1-n)))
			s.model.do(line[n])
		}
		s.commitInOneLine(line...)
		check("after ten in a line", want-10)
		s.restart()
		fails = true
		check("with a failing disk", want)
		for range 125 {
			time.Sleep(time.Second)
			logOut()
		}
		compare(t, "the compactions that fail in 125 seconds", compactions, 3)
		s.survivesAKill("after compactions that failed")
	})
}

// TestBytesOfACreate counts what is given to write(2) for the idea of the API document, up to a clean stop.
func TestBytesOfACreate(t *testing.T) {
	const creates, limit = 1500, 400
	written, compactions := int64(0), 0
	s := newTestStore(t, func(op, path string, do func() error) error {
		before, _ := os.Stat(path)
		err := noSync(op, path, do)
		switch op {
		case "write":
			written += must(os.Stat(path)).Size() - before.Size()
		case "create":
			compactions++
		}
		return err
	})
	p := person(s.newID())
	s.must(p.signUp("a@example.org"))
	for range creates {
		s.must(p.create(s.newID(), "the-content", 8))
	}
	wantError(t, "a stop", s.close(), nil)
	compare(t, "the compactions, those of the start and the stop", compactions, 2)
	if each := written / creates; each > limit {
		t.Errorf("got %d bytes for each create, want at most %d", each, limit)
	}
}

// Crashes and failures:

// crashes maps each kind of crash to what it leaves of a file, part of which was fsynced. A power loss may or may not
// lose the rest and the name: POSIX does not say in what order they reach the disk.
var crashes = map[string]func(synced, rest string) string{
	"a kill":                             nil, // it loses nothing
	"a power loss":                       func(synced, _ string) string { return synced },
	"a power loss that spares the names": func(synced, _ string) string { return synced },
	"a power loss that spares half":      func(synced, rest string) string { return synced + rest[:len(rest)/2] },
	"a power loss with a lost block": func(synced, rest string) string {
		half := len(rest) / 2
		return synced + strings.Repeat("\x00", half) + rest[half:]
	},
}

// TestACrashLosesNothing plays the script, and before every file operation checks what each kind of crash leaves:
// what was acknowledged, and all or nothing of the change under way. The next start may crash, too.
func TestACrashLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, ops := newPlayer(t), 0
		p.fake.before = func(op string) {
			p.lookAt(fmt.Sprintf("before operation %d, %s", ops, op), p.fake, 1, p.allowed.Load().([]string)...)
			ops++
		}
		p.play("")
		p.fake.before("the end")
	})
}

// TestACrashUnderManyClients looks in the same way, while eight clients share lines and compactions.
func TestACrashUnderManyClients(t *testing.T) {
	fake, clients := newFakeDisk(), crowd{}
	s := newTestStore(t, fake.step)
	fake.before = func(op string) {
		for kind := range crashes {
			checkHolds(t, "before "+op+", "+kind, fake.after(kind).left().read(t, s.scratch), clients.acknowledged())
		}
	}
	for n := range 8 {
		clients.join(s, somebody(n), func(created int) bool {
			s.compactSoon()
			return created < 5
		})
	}
	clients.Wait()
}

// TestAFailureAtAnyOperation lets each operation of the script fail, with no effect, half of it, or all of it. A
// change is then rejected and never seen, nothing else is lost, and the store heals by itself.
func TestAFailureAtAnyOperation(t *testing.T) {
	seen := make(map[string]bool)
	for n, failed := 0, "write"; failed != ""; n++ {
		for _, effect := range []string{"no effect", "half its effect", "its whole effect"} {
			if effect == "half its effect" && failed != "write" {
				continue
			}
			synctest.Test(t, func(t *testing.T) {
				p, count := newPlayer(t), 0
				p.seen, failed = seen, ""
				p.fake.inject = func(op, path string, do func() error) error {
					if count++; count != n+1 {
						return do()
					}
					p.harmless = filepath.Ext(path) == ".tmp" || op == "rename" && effect == "no effect"
					switch failed = op; effect {
					case "half its effect":
						return halfWrite(path, do)
					case "its whole effect":
						do()
					}
					return errInjected
				}
				p.play(fmt.Sprintf("operation %d fails with %s", n, effect))
			})
		}
	}
}

// A player plays the script, on a fake disk.
type player struct {
	*store
	t     *testing.T
	fake  *fakeDisk
	paths []string
	seen  map[string]bool // crashes that were looked at: many leave the same

	harmless      bool         // what failed was not FILE
	turn          sync.Mutex   // one change is under way at a time
	done          []change     // what was acknowledged
	allowed       atomic.Value // []string: what there may be after a crash
	interruptions []change     // to be made during a compaction
}

func newPlayer(t *testing.T) *player {
	paths := []string{scratch(t), scratch(t), scratch(t)}
	p := &player{t: t, fake: newFakeDisk(), paths: paths, seen: make(map[string]bool)}
	p.allowed.Store([]string{""})
	return p
}

// step makes changes while a compaction runs: when it makes FILE.tmp, and when it
// writes that for the first and the second time. At the third, it holds fileMu.
func (p *player) step(op, path string, do func() error) error {
	if len(p.interruptions) > 0 && filepath.Ext(path) == ".tmp" && (op == "create" || op == "write") {
		c := p.interruptions[0]
		p.interruptions = p.interruptions[1:]
		p.try(c) // and if it fails, nobody tries again
	}
	return p.fake.step(op, path, do)
}

// try makes a change and notes it, unless it could not be saved.
func (p *player) try(c change) error {
	p.turn.Lock()
	defer p.turn.Unlock()
	with := append(slices.Clip(p.done), c)
	p.allowed.Store([]string{after(p.done...), after(with...)})
	err := p.commit(c)
	if !errors.Is(err, errNotSaved) {
		err, p.done = nil, with
	} else if p.harmless {
		p.t.Errorf("%s is rejected, but FILE has not failed", inJSON(c))
	}
	p.allowed.Store([]string{after(p.done...)})
	return err
}

func (p *player) play(name string) {
	path := p.paths[2]
	for run, changes := range script() {
		p.store = mustOpen(p.t, path, p.step)
		if p.start() != nil {
			abandon(p.store) // the process ends, and somebody starts another
			p.look(name + ", in a start")
			if run == 0 {
				compare(p.t, name+": the files after the first start", readFiles(p.t, path), files{})
			}
			p.store = mustStart(p.t, path, p.step)
		}
		half := len(changes) / 2
		for n, c := range changes {
			if n == half {
				p.compactSoon()
				p.interruptions = changes[half+1 : half+4]
			}
			if n <= half || n >= half+4 { // else it was made during the compaction
				p.insist(name, c)
			}
		}
		compare(p.t, name+", killed", readFiles(p.t, path).read(p.t, p.paths[0]), after(p.done...))
		err := p.close()
		p.look(name + ", in a stop")
		if left := readFiles(p.t, path); err == nil && len(left) != 1 {
			p.t.Errorf("%s: a stop leaves %q", name, left)
		}
		abandon(p.store)
	}
}

// insist makes a change, again if it is rejected, until the store has healed.
func (p *player) insist(name string, c change) {
	err := p.try(c)
	for attempt := 0; err != nil && attempt < 3; attempt++ {
		synctest.Wait() // until the store has healed, or tried to
		p.look(name + ", rejected")
		time.Sleep(2 * time.Second) // by the clock of synctest
		err = p.try(c)
	}
	synctest.Wait() // for the compaction
	compare(p.t, name+", acknowledged", contents(p.store), after(p.done...))
	if err != nil || p.collecting || p.collected != nil || name == "" && len(p.interruptions) > 0 {
		p.t.Errorf("%s: does not heal, still collects, or had no interruptions", name)
	}
	compare(p.t, name+", GET /healthz knows that FILE is broken", p.journal.broken && !p.failing.Load(), false)
	p.interruptions = nil
}

// look compares what there is, and what a crash would leave at rest.
func (p *player) look(when string) {
	p.t.Helper()
	want := after(p.done...)
	compare(p.t, when, contents(p.store), want)
	p.lookAt(when, p.fake, 0, want)
}

// lookAt checks what each kind of crash would leave and, again times, what another
// crash during the next start would. What that start has shown must be durable.
func (p *player) lookAt(when string, d *fakeDisk, again int, want ...string) {
	for kind := range crashes {
		next, when := d.after(kind), when+", "+kind
		key := fmt.Sprint(next.left(), next.after("a power loss").left(), want, again)
		if p.seen[key] {
			continue
		}
		p.seen[key] = true
		got := next.left().read(p.t, p.paths[again])
		if !slices.Contains(want, got) {
			compare(p.t, when, got, want[0])
		} else if again > 0 {
			next.before = func(op string) {
				p.lookAt(when+", and in the next start before "+op, next, again-1, want...)
			}
			s := mustStart(p.t, p.paths[again], next.step)
			p.lookAt(when+", and after the next start", next, again-1, got)
			next.before = nil
			s.commit(somebody(9).signUp("late@example.org")) // to FILE, whose name must be durable
			p.lookAt(when+", and after a change then", next, again-1, contents(s))
			abandon(s)
		}
	}
}

// script is all that people do, in three runs of the server. In the middle of each
// there is a compaction, and the next three changes are made during that.
func script() [][]change {
	ann, bob, carl := somebody(1), somebody(2), somebody(3)
	return [][]change{{
		ann.signUp("Ann@example.org"), ann.create(ideaID(1), "tea", 5),
		bob.signUp("bob@example.org"), bob.create(ideaID(2), "rain", 6),
		ann.logIn("ann-1", 50), ann.update(ideaID(1), "green tea", 7),
		ann.create(ideaID(3), "biscuits", 5), bob.remove(ideaID(2)),
		ann.logOut("user00001-0", 1), ann.create(ideaID(4), "scones", 5),
	}, {
		bob.create(ideaID(5), "sun", 10), ann.remove(ideaID(3)), ann.create(ideaID(6), "jam", 8),
		bob.logIn("bob-1", 101), // ends the session of the sign-up
		bob.update(ideaID(5), "more sun", 10), ann.logOut("ann-1", 2),
		ann.update(ideaID(6), "plum jam", 9), ann.create(ideaID(8), "butter", 9), bob.logOut("nothing", 1),
	}, {
		ann.remove(ideaID(1)), carl.signUp("carl@example.org"), bob.logOut("bob-1", 3),
		carl.create(ideaID(7), "a boat", 10), carl.logOut("", 4), bob.remove(ideaID(5)),
		somebody(4).signUp("dora@example.org"), carl.update(ideaID(7), "two boats", 10), carl.logIn("carl-1", 60),
	}}
}

// A fakeDisk knows what a disk may lose if it is not fsynced: the bytes of a file, and which file has a name.
type fakeDisk struct {
	mu            sync.Mutex
	files         []fakeFile
	live, durable map[string]int  // which of the files has a name
	before        func(op string) // called before each operation
	inject        disk
}

type fakeFile struct{ synced, written string }

func newFakeDisk() *fakeDisk {
	return &fakeDisk{live: make(map[string]int), durable: make(map[string]int)}
}

// after returns the disk as it is after a crash. A kill loses nothing, but what was not fsynced still can be lost.
func (d *fakeDisk) after(kind string) *fakeDisk {
	next := &fakeDisk{files: slices.Clone(d.files), live: maps.Clone(d.live), durable: maps.Clone(d.durable)}
	switch kind {
	case "a kill":
		return next
	case "a power loss":
		next.live = maps.Clone(d.durable)
	default:
		next.durable = maps.Clone(d.live)
	}
	for n, f := range next.files {
		rest := f.written[min(len(f.synced), len(f.written)):] // a truncation can be lost, too
		left := crashes[kind](f.synced, rest)
		next.files[n] = fakeFile{left, left}
	}
	return next
}

// left returns the files that there are, whether fsynced or not.
func (d *fakeDisk) left() files {
	f := make(files)
	for name, at := range d.live {
		f[name] = d.files[at].written
	}
	return f
}

func (d *fakeDisk) step(op, path string, do func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	name := filepath.Base(path)
	if d.before != nil {
		d.before(op + " " + name)
	}
	happened := errInjected
	err := d.inject.do(op, path, func() error {
		happened = noSync(op, path, do)
		return happened
	})
	if happened != nil {
		return err
	}
	switch op { // the disk has it, even if it says otherwise
	case "create":
		d.live[name] = len(d.files)
		d.files = append(d.files, fakeFile{})
	case "rename":
		d.live[name] = d.live[name+".tmp"]
		delete(d.live, name+".tmp")
	}
	at, isFile := d.live[name]
	switch {
	case isFile:
		d.files[at].written = string(must(os.ReadFile(path)))
		if op == "sync" {
			d.files[at].synced = d.files[at].written
		}
	case op == "sync": // the directory
		d.durable = maps.Clone(d.live)
	}
	return err
}

// TestABrokenFileGetsNoMoreBytes breaks FILE: an fsync fails, so its contents are unknown, or a truncation or its
// fsync does, so half a line may be left. Then each attempt to heal fails at another operation; in the third and
// fifth, it still takes effect.
func TestABrokenFileGetsNoMoreBytes(t *testing.T) {
	for want, fails := range map[string]int{"[write sync truncate sync]": 2, "[write truncate]": 2, "[write truncate sync]": 3} {
		synctest.Test(t, func(t *testing.T) { breakFile(t, fails, want) })
	}
}

// breakFile lets the operation with this number fail once, and wants FILE to get only these operations.
func breakFile(t *testing.T, fails int, want string) {
	failing, attempts, ops := false, 0, []string(nil)
	s := newTestStore(t, func(op, path string, do func() error) error {
		if op == "create" {
			attempts++
		}
		switch attempt := fmt.Sprint(attempts, " ", op); {
		case !failing:
		case filepath.Base(path) == dataName && op != "rename":
			if ops = append(ops, op); len(ops) == fails {
				return errInjected
			} else if op == "write" && strings.HasPrefix(want, "[write truncate") {
				return halfWrite(path, do)
			}
		case attempt == "3 sync", attempt == "5 rename":
			do()
			return errInjected
		case attempt == "1 create", attempt == "2 write", attempt == "4 rename",
			attempt == "6 sync" && filepath.Ext(path) != ".tmp": // that of the directory
			return errInjected
		}
		return do()
	})
	attempts = 0
	ann := somebody(1)
	s.must(ann.signUp("a@example.org"), ann.create(ideaID(1), "tea", 5))
	failing = true
	for second := range 6 {
		for range 50 {
			wantError(t, "broken", s.commit(ann.update(ideaID(1), "coffee", 5)), errNotSaved)
			synctest.Wait()
			wantError(t, "broken", s.check(), errNotSaved)
			synctest.Wait()
		}
		compare(t, "the attempts to heal", attempts, second+1)
		s.survivesAKill("meanwhile")
		time.Sleep(time.Second)
	}
	s.check() // it heals in the background
	synctest.Wait()
	failing = false
	compare(t, "the operations on FILE", ops, want)
	wantError(t, "healed", s.check(), nil)
	s.must(ann.update(ideaID(1), "cocoa", 5))
	s.survivesAKill("healed")
	s.restart()
	s.survivesAKill("restarted")
}

// TestAFailedPartOfASnapshot lets the fsync of each part fail. A later one may succeed although the part is lost.
func TestAFailedPartOfASnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const parts = 5 // of 1,024 changes, and the last one
		syncs, fails := 0, 0
		s := newTestStore(t, func(op, path string, do func() error) error {
			if op == "sync" && filepath.Ext(path) == ".tmp" {
				if syncs++; syncs == fails {
					return errInjected
				}
			}
			return noSync(op, path, do)
		})
		s.must(somebody(1).signUp("a@example.org"))
		for n := range 5000 {
			s.must(somebody(1).create(ideaID(n), "tea", 5))
		}
		for fails = 1; fails <= parts+1; fails++ {
			before := s.file()
			syncs = 0
			s.compactSoon()
			s.must(somebody(1).logOut("", int64(fails)))
			synctest.Wait()
			compare(t, "FILE is kept", strings.HasPrefix(s.file(), before), fails <= parts)
			compare(t, "the files", len(readFiles(t, s.path)), 1)
			compare(t, "the fsyncs, none after one that fails", syncs, min(fails, parts))
			s.survivesAKill("after a compaction")
		}
	})
}

// TestAStopOfABrokenFile stops a store whose only change since the snapshot left half a line, which cannot be removed.
func TestAStopOfABrokenFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failing := false
		s := newTestStore(t, func(op, path string, do func() error) error {
			switch {
			case failing && op == "write":
				return halfWrite(path, do)
			case failing:
				return errInjected
			}
			return noSync(op, path, do)
		})
		s.must(somebody(1).signUp("a@example.org"))
		s.restart()
		before := readFiles(t, s.path)
		failing = true
		wantError(t, "a change", s.commit(somebody(1).logIn("key", 10)), errNotSaved)
		synctest.Wait() // until the store has tried to heal
		failing = false
		wantError(t, "a stop", s.close(), nil)
		compare(t, "the files", readFiles(t, s.path), before)
	})
}

// TestAFullDisk rejects every change, and leaves FILE as it was.
func TestAFullDisk(t *testing.T) {
	var before files // if the disk is full
	s := newTestStore(t, func(op, path string, do func() error) error {
		if before != nil && op == "write" {
			return halfWrite(path, do)
		}
		return noSync(op, path, do)
	})
	check := func(what string, err, want error) {
		t.Helper()
		wantError(t, what, err, want)
		s.agrees(what)
		compare(t, what+", the files", readFiles(t, s.path), before)
	}
	ann := somebody(1)
	s.must(ann.signUp("a@example.org"), ann.create(ideaID(1), "tea", 5))
	before = readFiles(t, s.path)
	for _, c := range ann.everyChange() {
		check(inJSON(c), s.commit(c), errNotSaved)
	}
	check("check", s.check(), errNotSaved)
	check("a compaction", s.compact(), syscall.ENOSPC)
	before = nil
	wantError(t, "with room again", s.check(), nil)
	s.must(ann.create(ideaID(2), "tea", 5))
	s.survivesAKill("with room again")
	before = readFiles(t, s.path)
	check("a stop", s.close(), syscall.ENOSPC)
}

// TestTheProbeIsTheLargestChange: if there is room for what check writes, there is room for any change.
func TestTheProbeIsTheLargestChange(t *testing.T) {
	s := newTestStore(t, noSync)
	s.failing.Store(true)
	before := len(s.file())
	wantError(t, "check", s.check(), nil)
	probe := len(s.file()) - before
	id, text := "zzzzzzzzz", strings.Repeat("<", maxContent) // six bytes each
	i := idea{ID: id, Content: text, Impact: 10, Ease: 10, Confidence: 10, Average: 20. / 3, Created: 1e10}
	create := &storedIdea{Owner: id, Idea: i, json: must(json.Marshal(i))}
	u := user{ID: id, Email: strings.Repeat("&", maxEmail), Name: text, Password: dummyHash(defaultCost())}
	first := &session{Key: hashToken(""), UserID: id, Start: 1e10, Expires: 1e10}
	for _, c := range []change{{Create: create}, {Update: create}, {User: &u, Session: first}} {
		if size := len(c.appendJSON(nil)); size > probe {
			t.Errorf("a change may take %d bytes, the probe takes %d", size, probe)
		}
	}
}

// TestKillUnderLoad kills the server under the load of 16 clients, over the same file, and once more in each start.
func TestKillUnderLoad(t *testing.T) {
	rounds := 3
	if *long {
		rounds = 60
	}
	path, clients := newLoadClients(t)
	for range rounds {
		early := startProcess(t, path)
		time.Sleep(rand.N(60 * time.Millisecond))
		early.kill()

		p := startProcess(t, path, "-quiet")
		p.underLoad(t, clients, 100+rand.IntN(2000), os.Kill)
		p.w.Close()
		if log := string(must(io.ReadAll(p.log))); strings.Contains(log, "DATA RACE") || strings.Contains(log, "panic") {
			t.Error(log)
		}
		checkClients(t, path, clients)
	}
}

// TestTerminateUnderLoad stops the server in the orderly way. If its log has lost its reader, requests go on; if the
// pipe is full, they hang until the stop ends them after a while.
func TestTerminateUnderLoad(t *testing.T) {
	skipWithoutSignals(t)
	for _, log := range []string{"is quiet", "has no reader", "is full"} {
		if log == "is full" && !*long {
			continue // it takes ten seconds
		}
		path, clients := newLoadClients(t)
		p, writes := startProcess(t, path, "-quiet="+strconv.FormatBool(log == "is quiet")), 500
		p.waitForURL()
		switch log {
		case "has no reader":
			p.r.Close()
		case "is full":
			p.w.Write(make([]byte, 65_000)) // of 64 KiB: there is room for three requests
			writes = 2
		}
		p.underLoad(t, clients, writes, syscall.SIGTERM)
		left := readFiles(t, path)
		if !p.ProcessState.Success() || len(left) != 1 || !json.Valid([]byte(left[dataName])) {
			t.Errorf("its log %s: %s, and the stop leaves %.100q, want one document", log, p.ProcessState, left)
		}
		checkClients(t, path, clients)
	}
}

// TestTerminateWhileReading ends a start at once, even if FILE is large.
func TestTerminateWhileReading(t *testing.T) {
	skipWithoutSignals(t)
	path, ann := scratch(t), somebody(1)
	creates := strings.Repeat(",\n"+inJSON(ann.create(ideaID(1), "tea", 5)), 200_000)
	before := files{dataName: header + inJSON(ann.signUp("a@example.org")) + creates + "]}"}
	before.write(t, path)
	p := startProcess(t, path)
	for _, err := os.Stat(path + ".lock"); err != nil; _, err = os.Stat(path + ".lock") {
		time.Sleep(time.Millisecond) // it is made before FILE is read
	}
	p.Process.Signal(syscall.SIGTERM)
	p.Wait()
	compare(t, "the end", p.ProcessState, "signal: terminated")
	compare(t, "FILE", readFiles(t, path), before)
}

// TestLogoutSurvivesAKill logs in again in the second of the old login: the new token could equal the old one.
func TestLogoutSurvivesAKill(t *testing.T) {
	path := scratch(t)
	const credentials = `{"email":"a@example.org","name":"Ann","password":"the-Secret-123"}`
	p := startProcess(t, path)
	body, _ := p.send(t, 201, "", "POST /users", credentials)
	for range 3 {
		old, refresh := member(body, "jwt"), `{"refresh_token":"`+member(body, "refresh_token")+`"}`
		p.send(t, 204, old, "DELETE /access-tokens", refresh)
		p.kill()
		p = startProcess(t, path)
		p.send(t, 401, old, "GET /me", "")
		p.send(t, 400, "", "POST /access-tokens/refresh", refresh)
		body, _ = p.send(t, 201, "", "POST /access-tokens", credentials)
		p.send(t, 200, member(body, "jwt"), "GET /me", "")
	}
}

// TestAPanicEndsTheProcess: a panic in apply must end the process, as memory may be half changed.
func TestAPanicEndsTheProcess(t *testing.T) {
	if path := os.Getenv(panicEnv); path != "" {
		defer func() { recover() }() // as net/http would
		s := must(openStore(path, nil, quiet))
		must(s, s.start()).accounts = nil
		s.commit(somebody(1).signUp("a@example.org"))
		return
	}
	path := scratch(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second) // if it hangs instead
	defer cancel()
	command := exec.CommandContext(ctx, os.Args[0], "-test.run=^"+t.Name()+"$")
	command.Env = append(os.Environ(), panicEnv+"="+path)
	output, err := command.CombinedOutput()
	if command.ProcessState.ExitCode() != 2 || !strings.Contains(string(output), "assignment to entry in nil map") {
		t.Errorf("got %v, want status 2:\n%s", err, output)
	}
	compare(t, "the next start", readFiles(t, path).read(t, path), after(somebody(1).signUp("a@example.org")))
}

// Helpers:

// A person is a user's id, and makes changes.
type person string

func somebody(n int) person { return person(fmt.Sprintf("user%05d", n)) }

func ideaID(n int) string { return fmt.Sprintf("idea%05d", n) }

func (p person) signUp(email string) change {
	u := user{ID: string(p), Email: email, Name: "Any Name", Password: "hash"}
	return change{User: &u, Session: p.logIn(string(p)+"-0", 1).Session}
}

func (p person) logIn(key string, second int64) change {
	return change{Session: &session{Key: key, UserID: string(p), Start: second, Expires: second + 100}}
}

// logOut ends an access token that expires that many seconds into the year 2100.
func (p person) logOut(key string, seconds int64) change {
	return change{Logout: &logout{tokenID: tokenID{string(p), 4_102_444_800 + seconds}, Key: key}}
}

func (p person) create(id, content string, impact int) change {
	i := idea{ID: id, Content: content, Impact: impact, Ease: 5, Confidence: 5, Created: 1_600_000_000}
	stored := &storedIdea{Owner: string(p), Idea: i}
	return change{Create: must(stored, stored.encode())}
}

func (p person) update(id, content string, impact int) change {
	return change{Update: p.create(id, content, impact).Create}
}

func (p person) remove(id string) change { return change{Delete: &ideaKey{string(p), id}} }

// everyChange is one of each kind, by somebody with ideaID(1).
func (p person) everyChange() []change {
	return []change{
		p.create(ideaID(2), "tea", 5), p.update(ideaID(1), "coffee", 6), p.remove(ideaID(1)),
		p.logIn("key", 10), p.logOut(string(p)+"-0", 0), somebody(2).signUp("b@example.org"),
	}
}

// randomChange may have to be rejected: its idea may be somebody else's or gone, or its e-mail may be taken.
func randomChange(r *rand.Rand, m *model, newID func() string) change {
	p := person(m.users[r.IntN(len(m.users))].ID)
	id, old := newID(), session{UserID: string(p)}
	if len(m.ideas) > 0 && r.IntN(20) > 0 {
		id = m.ideas[r.IntN(len(m.ideas))].Idea.ID
	}
	if len(m.sessions) > 0 {
		old = m.sessions[r.IntN(len(m.sessions))]
	}
	m.second += r.Int64N(5)
	switch n := r.IntN(100); {
	case n < 5:
		email := fmt.Sprintf("x%d-%s@%s", r.IntN(100), m.users[0].ID, []string{"example.org", "EXAMPLE.org"}[n%2])
		return person(newID()).signUp(email)
	case n < 20:
		return p.logIn(fmt.Sprint(r.Uint64()), m.second)
	case n < 25:
		return p.logOut(old.Key, r.Int64N(10))
	case n < 30:
		return person(old.UserID).logOut(old.Key, m.second)
	case n < 60:
		return p.create(newID(), "<é> & \u2028", 1+r.IntN(10))
	case n < 80:
		return p.update(id, "changed", 1+r.IntN(10))
	}
	return p.remove(id)
}

func inJSON(c change) string { return string(must(json.Marshal(c))) }

// A model holds what was acknowledged, in lists.
type model struct {
	users     []user
	sessions  []session
	ideas     []*storedIdea
	loggedOut []tokenID
	second    int64 // for logins
}

// do makes a change, or returns why it must be rejected.
func (m *model) do(c change) error {
	switch {
	case c.User != nil:
		if slices.ContainsFunc(m.users, func(u user) bool { return strings.EqualFold(u.Email, c.User.Email) }) {
			return errEmailTaken
		}
		m.users = append(m.users, *c.User)
		m.sessions = append(m.sessions, *c.Session)
	case c.Session != nil:
		isTheirs := func(s session) bool { return s.UserID == c.Session.UserID }
		m.sessions = slices.DeleteFunc(m.sessions, func(s session) bool { return isTheirs(s) && s.Expires <= c.Session.Start })
		theirs := slices.DeleteFunc(slices.Clone(m.sessions), func(s session) bool { return !isTheirs(s) })
		if len(theirs) == 100 {
			m.sessions = slices.DeleteFunc(m.sessions, func(s session) bool { return s == theirs[0] })
		}
		m.sessions = append(m.sessions, *c.Session)
	case c.Logout != nil:
		ended := func(s session) bool { return s.Key == c.Logout.Key && s.UserID == c.Logout.UserID }
		m.sessions = slices.DeleteFunc(m.sessions, ended)
		if !slices.Contains(m.loggedOut, c.Logout.tokenID) {
			m.loggedOut = append(m.loggedOut, c.Logout.tokenID)
		}
	case c.Create != nil:
		m.ideas = append(m.ideas, c.Create)
	case c.Update != nil:
		if err := m.do(change{Delete: &ideaKey{c.Update.Owner, c.Update.Idea.ID}}); err != nil {
			return err
		}
		m.ideas = append(m.ideas, c.Update)
	case c.Delete != nil:
		at := slices.IndexFunc(m.ideas, func(i *storedIdea) bool { return ideaKey{i.Owner, i.Idea.ID} == *c.Delete })
		if at < 0 {
			return errNoIdea
		}
		m.ideas = slices.Delete(m.ideas, at, at+1)
	}
	return nil
}

// String sorts the lists of all users, and names the owner of each entry.
func (m *model) String() string {
	slices.SortFunc(m.ideas, func(a, b *storedIdea) int {
		return -cmp.Or(cmp.Compare(a.Idea.Average, b.Idea.Average), cmp.Compare(a.Idea.ID, b.Idea.ID))
	})
	return m.inWords()
}

func (m *model) inWords() string {
	var lines []string
	add := func(userID string, kind int, what any) { lines = append(lines, fmt.Sprintln(userID, kind, what)) }
	for _, u := range m.users {
		add(u.ID, 0, u)
	}
	for _, s := range m.sessions {
		add(s.UserID, 1, s)
	}
	for _, i := range m.ideas {
		add(i.Owner, 2, string(i.json))
	}
	for _, token := range slices.SortedFunc(slices.Values(m.loggedOut), compareTokens) {
		add(token.UserID, 3, token)
	}
	prefix := len(somebody(0)) + len(" 0") // what one user has of a kind stays in its order
	slices.SortStableFunc(lines, func(a, b string) int { return cmp.Compare(a[:prefix], b[:prefix]) })
	return strings.Join(lines, "")
}

func after(changes ...change) string {
	var m model
	for _, c := range changes {
		m.do(c)
	}
	return m.String()
}

// contents asks the store, at rest, for all that it has.
func contents(s *store) string {
	var m model
	for id, a := range s.accounts {
		u, _ := s.userByEmail(strings.ToUpper(a.user.Email))
		m.users = append(m.users, u)
		for _, theirs := range a.sessions {
			session, _, _ := s.session(theirs.Key)
			m.sessions = append(m.sessions, session)
		}
		for _, listed := range pages(s, id) {
			if i, err := s.idea(ideaKey{id, listed[len(`{"id":"`):][:9]}); err == nil && string(i.json) == listed {
				m.ideas = append(m.ideas, i)
			}
		}
	}
	m.loggedOut = slices.Collect(maps.Keys(s.loggedOut))
	text, found := m.inWords(), len(s.emails)+len(s.sessions)+len(s.ideas)+len(s.loggedOut)
	if n := strings.Count(text, "\n"); n != found {
		text += fmt.Sprintf("the indexes have %d things, not %d\n", found, n)
	}
	return text
}

func pages(s *store, owner string) (all []string) {
	for page := 1; ; page++ {
		list, total := s.pageOfIdeas(owner, page)
		var ideas []json.RawMessage
		err := json.Unmarshal(list, &ideas)
		for _, i := range must(ideas, err) {
			all = append(all, string(i))
		}
		if page*pageSize >= total {
			return all
		}
	}
}

// compare shows the first lines that differ when both are printed.
func compare(t testing.TB, name string, got, want any) {
	t.Helper()
	g, w := strings.Split(fmt.Sprint(got), "\n"), strings.Split(fmt.Sprint(want), "\n")
	for len(g) > 1 && len(w) > 1 && g[0] == w[0] {
		g, w = g[1:], w[1:]
	}
	if !slices.Equal(g, w) {
		t.Errorf("%s: got\n%s\nwant\n%s", name, g[0], w[0])
	}
}

func wantError(t testing.TB, name string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: got the error %v, want %v", name, got, want)
	}
}

// A testStore is a store and the model of it.
type testStore struct {
	*store
	model   model
	t       testing.TB
	scratch string // another path
}

func newTestStore(t testing.TB, disk disk) *testStore {
	t.Helper()
	return &testStore{store: mustStart(t, scratch(t), disk), t: t, scratch: scratch(t)}
}

// must makes changes, one after the other, and notes them.
func (s *testStore) must(changes ...change) {
	s.t.Helper()
	for _, c := range changes {
		wantError(s.t, inJSON(c), cmp.Or(s.commit(c), s.model.do(c)), nil)
	}
}

// commitInOneLine makes several changes in one commit.
func (s *testStore) commitInOneLine(changes ...change) {
	var queue []*pendingChange
	for _, c := range changes {
		queue = append(queue, &pendingChange{c, c.appendJSON(nil), make(chan error, 1)})
	}
	s.fileMu.Lock()
	defer s.fileMu.Unlock()
	s.finish(queue, s.write(queue))
}

func (s *testStore) agrees(when string) {
	s.t.Helper()
	compare(s.t, when, contents(s.store), s.model.String())
}

// survivesAKill also checks what a new store makes of FILE.
func (s *testStore) survivesAKill(when string) {
	s.t.Helper()
	s.agrees(when)
	compare(s.t, when+", then a kill", readFiles(s.t, s.path).read(s.t, s.scratch), s.model.String())
}

func (s *testStore) restart() {
	s.t.Helper()
	wantError(s.t, "a stop", s.close(), nil)
	abandon(s.store)
	s.store = mustStart(s.t, s.path, s.disk)
}

func (s *testStore) file() string { return string(must(os.ReadFile(s.path))) }

// compact runs a compaction now.
func (s *testStore) compact() error {
	s.compacting.Lock()
	defer s.compacting.Unlock()
	return s.store.compact(true)
}

// compactSoon lets the next change cause a compaction.
func (s *store) compactSoon() {
	s.fileMu.Lock()
	defer s.fileMu.Unlock()
	s.journal.count, s.lastCompaction = 1<<30, time.Time{}
}

// abandon leaves FILE as it is, as the end of a process would.
func abandon(s *store) {
	s.fileMu.Lock()
	closed := s.closed
	s.closed = true
	s.fileMu.Unlock()
	if !closed {
		s.compacting.Lock() // and nobody else from now on
	}
	s.release()
}

// mustOpen opens a store that is abandoned at the end of the test.
func mustOpen(t testing.TB, path string, disk disk) *store {
	t.Helper()
	s, err := openStore(path, disk, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { abandon(s) })
	return s
}

func mustStart(t testing.TB, path string, disk disk) *store {
	t.Helper()
	s := mustOpen(t, path, disk)
	wantError(t, "a start", s.start(), nil)
	return s
}

var quiet = slog.New(slog.DiscardHandler)

func atOnce(n int, do func(n int)) {
	var wg sync.WaitGroup
	for n := range n {
		wg.Go(func() { do(n) })
	}
	wg.Wait()
}

// BenchmarkStore measures durable creates, with 1 to 64 clients per core, and a start.
func BenchmarkStore(b *testing.B) {
	for _, clients := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("create/clients=%d", clients), func(b *testing.B) {
			s := newTestStore(b, nil)
			s.must(somebody(1).signUp("a@example.org"))
			b.SetParallelism(clients)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					wantError(b, "a create", s.commit(somebody(1).create(s.newID(), "the-content", 8)), nil)
				}
			})
		})
	}
	b.Run("start/ideas=100000", func(b *testing.B) {
		s := newTestStore(b, noSync)
		s.must(somebody(1).signUp("a@example.org"))
		for n := range 100_000 {
			s.commit(somebody(1).create(ideaID(n), "the-content", 8))
		}
		s.close()
		abandon(s.store)
		for b.Loop() {
			must(openStore(s.path, nil, quiet)).release()
		}
	})
}

var errInjected = errors.New("injected")

// noSync skips the fsync in tests that are not about it.
func noSync(op, _ string, do func() error) error {
	if op == "sync" {
		return nil
	}
	return do()
}

// halfWrite writes only half, as when the disk becomes full.
func halfWrite(path string, do func() error) error {
	before := must(os.Stat(path)).Size()
	if err := do(); err != nil {
		return err
	}
	os.Truncate(path, (before+must(os.Stat(path)).Size())/2)
	return syscall.ENOSPC
}

const dataName = "pool.json"

// scratch is the path of a FILE in a directory of its own.
func scratch(t testing.TB) string { return filepath.Join(t.TempDir(), dataName) }

// files are FILE and FILE.tmp, by name.
type files map[string]string

func readFiles(t testing.TB, path string) files {
	t.Helper()
	f := make(files)
	for _, path := range []string{path, path + ".tmp"} {
		if data, err := os.ReadFile(path); !errors.Is(err, fs.ErrNotExist) {
			f[filepath.Base(path)] = string(must(data, err))
		}
	}
	return f
}

// write makes a directory hold these files. Overwriting a file is 25 times as fast as creating one.
func (f files) write(t testing.TB, path string) {
	t.Helper()
	for _, path := range []string{path, path + ".tmp"} {
		data, exists := f[filepath.Base(path)]
		if !exists {
			os.Remove(path)
			continue
		}
		file := must(os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600))
		_, err := file.WriteString(data)
		wantError(t, path, errors.Join(err, file.Truncate(int64(len(data))), file.Close()), nil)
	}
}

// read returns what a store makes of the files, at a path: its contents in lines, or an error.
func (f files) read(t testing.TB, path string) string {
	t.Helper()
	f.write(t, path)
	s, err := openStore(path, nil, quiet)
	if err != nil {
		return err.Error()
	}
	defer s.release()
	return contents(s)
}

// rejected fails the test unless opening returns an error of one line with a text, and leaves the files as they are.
func (f files) rejected(t *testing.T, path, name, text string) {
	t.Helper()
	if got := f.read(t, path); got == "" || !strings.Contains(got, text) || strings.Contains(got, "\n") {
		t.Errorf("%s: got %q, want an error of one line with %q", name, got, text)
	}
	compare(t, name+", the files", readFiles(t, path), f)
}

// example returns a FILE, value by value, and what there is after the snapshot and after each later line.
func example(t *testing.T, more ...change) (values, states []string) {
	s := newTestStore(t, noSync)
	ann, bob := somebody(1), somebody(2)
	s.must(ann.signUp("a@example.org"), bob.signUp("b@example.org"))
	s.must(ann.create(ideaID(1), "tea", 5), bob.create(ideaID(2), "rain", 6), ann.logOut("", 0))
	s.must(more...)
	s.restart()
	for _, line := range [][]change{
		{},
		{ann.create(ideaID(3), "scones", 7)},
		{bob.logIn("key", 10), ann.remove(ideaID(3))},
		{bob.update(ideaID(2), "snow", 8), bob.logOut("key", 1)},
		{bob.remove(ideaID(2))},
	} {
		s.commitInOneLine(line...)
		states = append(states, contents(s.store))
	}
	return regexp.MustCompile(`(?s).*?"crc32c":"\w{8}"}\n`).FindAllString(s.file(), -1), states
}

// header begins a FILE, and is followed by changes.
const header = `{"format":2,"last_id":"0","changes":[` + "\n"

var checksum = regexp.MustCompile(`,"crc32c":"\w+"`)

// laterLine is what follows the snapshot, without its end.
func laterLine(c change) string { return `{"changes":[` + inJSON(c) + "]" }

// withChecksums makes a FILE of values that lack their ends.
func withChecksums(values ...string) string {
	var file strings.Builder
	sum, castagnoli := uint32(0), crc32.MakeTable(crc32.Castagnoli)
	for _, value := range values {
		sum = crc32.Update(sum, castagnoli, []byte(value))
		fmt.Fprintf(&file, "%s,\"crc32c\":\"%08x\"}\n", value, sum)
	}
	return file.String()
}

// copyFile copies in small steps, as cp does.
func copyFile(t *testing.T, from, to string) {
	in, out := must(os.Open(from)), must(os.Create(to))
	_, err := io.CopyBuffer(struct{ io.Writer }{out}, struct{ io.Reader }{in}, make([]byte, 4096))
	wantError(t, "cp", errors.Join(err, in.Close(), out.Close()), nil)
}

const serveEnv, panicEnv = "IDEAPOOL_TEST_SERVE", "IDEAPOOL_TEST_PANIC"

// TestMain lets the test binary be the server, for the tests that kill it.
func TestMain(m *testing.M) {
	if os.Getenv(serveEnv) == "" {
		os.Exit(m.Run())
	}
	main()
}

// A process is the server in a process of its own.
type process struct {
	*exec.Cmd
	r, w       *os.File // its stderr
	log        *bufio.Reader
	waitForURL func() string
}

func startProcess(t *testing.T, path string, flags ...string) *process {
	t.Helper()
	writeFile(t, path+".pem", pemText("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(rfcKey())))) // making one is slow
	r, w, err := os.Pipe()
	flags = append(flags, "-addr", "127.0.0.1:0", "-data", path, "-key", path+".pem")
	p := &process{Cmd: exec.Command(os.Args[0], flags...), r: r, w: w, log: bufio.NewReader(r)}
	p.waitForURL = sync.OnceValue(func() (url string) {
		for url == "" {
			url = regexp.MustCompile(`http://127.*|$`).FindString(must(p.log.ReadString('\n')))
		}
		return url
	})
	p.Env, p.Stderr = append(os.Environ(), serveEnv+"=1"), w
	if err = cmp.Or(err, p.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	return p
}

func (p *process) kill() {
	p.Process.Kill() // fails if it has exited
	p.Wait()
	p.r.Close()
	p.w.Close()
}

// send returns the body of a response, if all of it arrives.
func (p *process) send(t *testing.T, status int, access, request, body string) (response string, ok bool) {
	t.Helper()
	method, path, _ := strings.Cut(request, " ")
	r := must(http.NewRequestWithContext(t.Context(), method, p.waitForURL()+path, strings.NewReader(body)))
	r.Header.Set("X-Access-Token", access)
	got, err := httpClient.Do(r)
	if err != nil {
		return "", false
	}
	defer got.Body.Close()
	data, err := io.ReadAll(got.Body)
	if err == nil && got.StatusCode != status {
		t.Errorf("%s: got %d, want %d: %s", request, got.StatusCode, status, data)
	}
	return string(data), err == nil && got.StatusCode == status
}

// httpClient gives up when the connection of a killed server stays open, as happens under Wine.
var httpClient = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}, Timeout: 20 * time.Second}

// member returns a string member of a JSON object.
func member(object, name string) string {
	var members map[string]any
	json.Unmarshal([]byte(object), &members)
	text, _ := members[name].(string)
	return text
}

// symlink fails on Windows, where not everybody may create links.
func symlink(target, path string) error {
	if runtime.GOOS == "windows" {
		return errors.ErrUnsupported
	}
	return os.Symlink(target, path)
}

func skipWithoutSignals(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("there are no signals")
	}
}

// underLoad has all clients at work until, after so many acknowledged writes, the server gets a signal.
func (p *process) underLoad(t *testing.T, clients []*loadClient, writes int, end os.Signal) {
	var acknowledged atomic.Int64
	atOnce(len(clients), func(n int) {
		for clients[n].change(t, p) {
			if acknowledged.Add(1) == int64(writes) {
				time.AfterFunc(rand.N(3*time.Millisecond), func() { p.Process.Signal(end) })
			}
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	p.Wait() // how it ended is in its ProcessState
}

// A loadClient is a user who remembers the responses.
type loadClient struct {
	userID, access string
	ideas          map[string]string // by id, in JSON
	underWay       string            // the id of a change without a response, "new", or ""
}

// newLoadClients makes 16 clients, and a FILE that knows them, so that no hashes need to be computed first.
func newLoadClients(t *testing.T) (path string, clients []*loadClient) {
	s := newTestStore(t, noSync)
	for n := range 16 {
		p := person(s.newID())
		s.must(p.signUp(fmt.Sprintf("%d@example.org", n)))
		access := must(newTokens(rfcKey()).sign(claims{UserID: string(p), Expires: 1e10}))
		clients = append(clients, &loadClient{string(p), access, make(map[string]string), ""})
	}
	abandon(s.store)
	return s.path, clients
}

// change makes a request and notes the response. It returns false if none came.
func (c *loadClient) change(t *testing.T, p *process) bool {
	var id string
	for id = range c.ideas { // any
	}
	request, status := "PUT /ideas/"+id, 200
	switch n := rand.IntN(4); {
	case id == "" || n > 1 && len(c.ideas) < 10: // few, so that the store compacts early
		id, request, status = "new", "POST /ideas", 201
	case n == 0:
		request, status = "DELETE /ideas/"+id, 204
	}
	c.underWay = id
	body := fmt.Sprintf(`{"content":"%d","impact":5,"ease":5,"confidence":5}`, rand.Uint64())
	response, ok := p.send(t, status, c.access, request, body)
	if !ok {
		return false
	}
	c.underWay = ""
	delete(c.ideas, id)
	if response != "" {
		c.ideas[member(response, "id")] = response
	}
	return true
}

// checkClients compares what there is with the responses. A change without one may have happened or not.
func checkClients(t *testing.T, path string, clients []*loadClient) {
	t.Helper()
	s := mustOpen(t, path, nil)
	defer abandon(s)
	for _, c := range clients {
		there := make(map[string]string)
		for _, text := range pages(s, c.userID) {
			id := member(text, "id")
			if there[id] = text; c.ideas[id] == "" && c.underWay == "new" {
				c.underWay = id
			}
		}
		got := maps.Clone(there)
		delete(got, c.underWay)
		delete(c.ideas, c.underWay)
		compare(t, "the ideas of "+c.userID, got, c.ideas)
		c.ideas, c.underWay = there, ""
	}
}
