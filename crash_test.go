package main

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// You may skip this file at first. Its tests let everything fail that can: FILE is
// damaged, the power is lost, an operation on the disk fails, the server is killed.
// Nothing that was acknowledged may be lost, and nobody may see what is not on disk.
//
// A fakeDisk runs the file operations of a store (see the type disk in store.go), and
// remembers two versions of each file, what was written and what was fsynced, and two
// versions of the directory, with and without the renames that were not fsynced. So a
// test can ask before each operation which files a crash would leave now, and open a
// store on them. After a kill, all that was written is there; after a power loss, what
// was fsynced, and perhaps a part of the rest. A test can also make an operation fail.

// TestDamageAtAnyByte lets FILE end at any byte, flips each of its bits, and puts zeros
// in the place of a block that was lost. All of this is damage, except in the last line,
// as long as that looks as if it had not been fsynced: then it was not acknowledged.
func TestDamageAtAnyByte(t *testing.T) {
	t.Parallel()
	values, states := example(t, "tea")
	file, path, last := strings.Join(values, ""), scratch(t), len(values)-1
	snapshot, lastLine := len(values[0])-len("\n"), len(file)-len(values[last])
	for at := range len(file) {
		where := fmt.Sprintf(" at byte %d", at)
		if at < snapshot {
			rejects(t, path, "cut"+where, file[:at])
		} else { // a line that lacks only its line end counts
			complete := strings.Count(file[snapshot:at+1], "\n")
			compare(t, "cut"+where, reopen(path, file[:at]), states[complete-1])
		}
		for bit := range 8 {
			flipped := []byte(file)
			flipped[at] ^= 1 << bit
			if at < len(file)-1 { // without the last line end, it would be incomplete
				rejects(t, path, "a flipped bit"+where, string(flipped))
			}
		}
		end := min(at+8, len(file))
		damaged := file[:at] + strings.Repeat("\x00", end-at) + file[end:]
		if at >= lastLine {
			compare(t, "a lost block"+where, reopen(path, damaged), states[last-1])
		} else if end < lastLine { // otherwise the last line has lost its beginning
			rejects(t, path, "a lost block"+where, damaged)
		}
	}
	damaged := file[:lastLine] + "\x00" + file[lastLine+1:]
	compare(t, "a lost block that ends with the first byte of a line", reopen(path, damaged), states[last-1])
}

// TestLinesOutOfPlace reads three lines after the snapshot: all orders of all lines, so
// that some are missing, repeated, or moved, and lines of another file.
func TestLinesOutOfPlace(t *testing.T) {
	values, states := example(t, "tea")
	others, _ := example(t, "coffee")
	path := scratch(t)
	for n := range 5 * 5 * 5 {
		a, b, c := n/25, n/5%5, n%5
		file := values[0] + values[a] + values[b] + values[c]
		if name := fmt.Sprint("the lines ", a, b, c); a == 1 && b == 2 && c == 3 {
			compare(t, name, reopen(path, file), states[3])
		} else {
			rejects(t, path, name, file)
		}
	}
	rejects(t, path, "the snapshot of another file", others[0]+values[1])
	rejects(t, path, "a line of another file", values[0]+values[1]+others[2])
	rejects(t, path, "an empty line", values[0]+"\n"+values[1])
}

// crashes are those that the tests look at. A kill loses nothing. A power loss may lose
// all that was not fsynced, or some of it: POSIX does not say in what order bytes and
// names reach the disk.
var crashes = []string{"a kill", "a power loss", "a loss of half the bytes", "a lost block"}

// TestACrashLosesNothing checks before each operation what each kind of crash leaves:
// what was acknowledged, and the change under way as a whole or not at all, while nobody
// sees it yet. The next start may crash, too. On some file systems, such as CIFS, the
// fsync of a directory returns an error.
func TestACrashLosesNothing(t *testing.T) {
	t.Parallel()
	for _, errno := range []error{nil, syscall.EINVAL, syscall.ENOTSUP} {
		synctest.Test(t, func(t *testing.T) {
			p := newPlayer(t)
			p.fake.inject = func(op, path string, do func() error) error {
				if op == "sync" && filepath.Ext(path) == "" {
					return cmp.Or(do(), errno)
				}
				return do()
			}
			p.fake.before = func(op string) {
				compare(t, "before "+op, contents(p.store), p.now)
				p.lookAt("before "+op, p.fake, 1, p.now, p.next)
			}
			p.play("")
			for _, kind := range reflect.VisibleFields(reflect.TypeFor[change]()) {
				has := func(c change) bool { return !reflect.ValueOf(c).FieldByIndex(kind.Index).IsZero() }
				if kind.Name != "Probe" && !slices.ContainsFunc(p.done, has) {
					t.Errorf("%s: add such a change to player.play", kind.Name)
				}
			}
		})
	}
}

// TestAFailureAtAnyOperation lets each operation fail, with no effect, half of it, or
// all of it. A change is then rejected and never seen, nothing else is lost, and the
// store heals by itself. After some failures, it lets another operation fail.
func TestAFailureAtAnyOperation(t *testing.T) {
	t.Parallel()
	var operations []string // those of the last run
	seen := make(map[string]bool)
	play := func(t *testing.T, first, second int, effect string) {
		operations = nil
		p := newPlayer(t)
		p.seen, p.twice = seen, first != second
		p.fake.inject = func(op, path string, do func() error) error {
			n := len(operations)
			operations = append(operations, op+" "+filepath.Base(path))
			if n != first && n != second {
				return do()
			}
			if effect == "half its effect" && op == "write" {
				do()
				if info, err := os.Stat(path); err == nil {
					os.Truncate(path, info.Size()-20) // within the last line
				}
			} else if effect == "its whole effect" && (op != "create" || runtime.GOOS != "windows") {
				do() // Windows removes no open file
			}
			return errInjected
		}
		p.play(fmt.Sprintf("operations %d and %d fail with %s", first, second, effect))
	}
	synctest.Test(t, func(t *testing.T) { play(t, -1, -1, "") })
	commit := slices.Index(operations, "write pool.json")
	compaction := commit + slices.Index(operations[commit:], "write pool.json.tmp")
	all := len(operations)
	for _, effect := range []string{"no effect", "half its effect", "its whole effect"} {
		for n := range all {
			synctest.Test(t, func(t *testing.T) { play(t, n, n, effect) })
		}
		for _, first := range []int{commit, commit + 1, compaction} { // commit + 1 is its fsync
			for n := range 8 {
				synctest.Test(t, func(t *testing.T) { play(t, first, first+1+n, effect) })
			}
		}
	}
}

// A player makes changes in three runs of the server, on a fake disk.
type player struct {
	*store
	t     *testing.T
	fake  *fakeDisk
	paths []string
	seen  map[string]bool // crashes that were looked at: many leave the same

	done     []change // what was acknowledged
	now      string   // the contents after these
	next     string   // the contents after the change under way
	compacts bool     // after the change under way
	twice    bool     // two operations may fail
}

func newPlayer(t *testing.T) *player {
	fake := &fakeDisk{t: t, inject: realDisk, files: make(map[string]fakeFile), durable: make(map[string]string)}
	return &player{t: t, fake: fake, paths: []string{scratch(t), scratch(t), scratch(t)}, seen: make(map[string]bool)}
}

// play ends the first and the last run by a stop, and the second one by a kill.
func (p *player) play(name string) {
	path := p.paths[2]
	for run := range 3 {
		p.store = openTestStore(p.t, path, p.step)
		if p.start() != nil { // the process ends, and somebody starts another
			compare(p.t, name+", a start fails in run", run, 0)
			abandon(p.store)
			p.look(name + ", in a start")
			p.store = startStore(p.t, path, p.step)
		}
		ann, email := somebody(run), fmt.Sprint(run, "@example.org")
		for n, c := range []change{
			ann.signUp(email),
			ann.logIn(string(ann)+"-1", 10),
			ann.create(ideaID(run), "<é> & \u2028", 5),
			ann.update(ideaID(run), "changed", 6),
			ann.logOut(string(ann)+"-1", 1),
			somebody(10 + run).signUp(strings.ToUpper(email)), // is in FILE, without effect
			ann.remove(ideaID(run)),
			ann.update(ideaID(run), "too late", 7), // is in FILE, without effect
			ann.create(ideaID(10+run), "tea", 8),
		} {
			p.compacts = n == 4
			p.insist(name, c)
		}
		if run != 1 {
			if p.close() == nil {
				wantOneDocument(p.t, name, path)
			}
			p.look(name + ", in a stop")
		}
		abandon(p.store)
	}
}

// insist makes a change, again if it is rejected, until the store has healed.
func (p *player) insist(name string, c change) {
	done := append(slices.Clip(p.done), c)
	p.next = after(done...)
	err := p.commit(c)
	for attempt := 0; errors.Is(err, errNotSaved) && attempt < 3; attempt++ {
		time.Sleep(2 * time.Second) // until the store may try again
		synctest.Wait()
		allowed := p.now
		if p.twice { // the disk may have failed to take the line back, too
			allowed = p.next
		}
		p.lookAt(name+", rejected", p.fake, 0, p.now, allowed)
		compare(p.t, name+", rejected", contents(p.store), p.now)
		err = p.commit(c)
	}
	p.done, p.now = done, p.next
	time.Sleep(time.Second) // until a compaction has ended
	synctest.Wait()
	p.look(name + ", acknowledged")
	if errors.Is(err, errNotSaved) {
		p.t.Errorf("%s: it does not heal", name)
	}
}

// step waits until all other goroutines do, so that a reader would see what it must not.
func (p *player) step(op, path string, do func() error) error {
	synctest.Wait()
	if p.compacts && op == "write" {
		p.file.tried = -1 << 30
	}
	return p.fake.step(op, path, do)
}

// look compares what there is, and what a crash would leave at rest.
func (p *player) look(when string) {
	p.t.Helper()
	compare(p.t, when, contents(p.store), p.now)
	p.lookAt(when, p.fake, 0, p.now)
}

// lookAt checks what each kind of crash would leave and, if again is 1, what another
// crash during the next start would. What that start has shown must be durable.
func (p *player) lookAt(when string, d *fakeDisk, again int, want ...string) {
	for _, kind := range crashes {
		next, when := d.after(kind), when+", "+kind
		key := fmt.Sprint(next.files, next.durable, want, again)
		if p.seen[key] {
			continue
		}
		p.seen[key] = true
		got, path := "", p.paths[again]
		if f, exists := next.files["pool.json"]; exists {
			got = reopen(path, f.written)
		} else {
			os.Remove(path)
		}
		if !slices.Contains(want, got) {
			compare(p.t, when, got, want[0])
		} else if again > 0 {
			next.before = func(op string) {
				p.lookAt(when+", and in the next start before "+op, next, again-1, want...)
			}
			s := startStore(p.t, path, next.step)
			p.lookAt(when+", and after the next start", next, again-1, got)
			next.before = nil
			s.commit(somebody(9).signUp("late@example.org")) // to FILE, whose name must be durable
			p.lookAt(when+", and after a change then", next, again-1, contents(s))
			abandon(s)
		}
	}
}

// A fakeDisk runs file operations, and knows what a crash would leave.
type fakeDisk struct {
	t       testing.TB
	files   map[string]fakeFile // by name
	durable map[string]string   // what a power loss leaves, by name
	renamed bool                // a rename was not fsynced
	before  func(op string)     // called before each operation
	inject  disk                // lets operations fail
}

type fakeFile struct {
	written, synced string
	broken          bool // an fsync has failed: a later one saves nothing but truncations
}

// step runs an operation, and remembers what it did, even if it says that it failed.
func (d *fakeDisk) step(op, path string, do func() error) error {
	name, happened := filepath.Base(path), false
	if _, exists := d.files[name]; exists && op == "rename" { // nobody may remove FILE first
		_, err := os.Stat(path)
		wantError(d.t, "before "+op+", "+name, err, nil)
	}
	if d.before != nil {
		d.before(op + " " + name)
	}
	err := d.inject(op, path, func() error {
		err := noSync(op, path, do)
		happened = err == nil
		return err
	})
	f, isFile := d.files[name]
	switch {
	case !happened:
	case op == "create":
		f, isFile = fakeFile{}, true
	case op == "rename":
		f, isFile, d.renamed = d.files[name+".tmp"], true, true
		delete(d.files, name+".tmp")
	case !isFile: // the directory is fsynced
		d.renamed = false
		clear(d.durable)
		for name, f := range d.files {
			d.durable[name] = f.synced
		}
	case op == "sync" && f.broken:
		f.synced = f.written[:min(len(f.written), len(f.synced))]
	case op == "sync":
		f.synced = f.written
	default:
		text, err := os.ReadFile(path)
		wantError(d.t, path, err, nil)
		f.written = string(text)
	}
	if isFile {
		f.broken = f.broken || op == "sync" && err != nil
		d.files[name] = f
		if !d.renamed {
			d.durable[name] = f.synced
		}
	}
	return err
}

// after returns the disk as it is after a crash.
func (d *fakeDisk) after(kind string) *fakeDisk {
	next := &fakeDisk{t: d.t, inject: realDisk, renamed: d.renamed}
	next.files, next.durable = maps.Clone(d.files), maps.Clone(d.durable)
	if kind == "a kill" { // a later power loss can still lose what was not fsynced
		return next
	}
	left := make(map[string]string)
	for name, f := range d.files {
		rest := f.written[min(len(f.synced), len(f.written)):] // a truncation can be lost, too
		if half := len(rest) / 2; kind == "a lost block" {
			left[name] = f.synced + strings.Repeat("\x00", half) + rest[half:]
		} else {
			left[name] = f.synced + rest[:half]
		}
	}
	if kind == "a power loss" {
		left = d.durable
	}
	clear(next.files)
	for name, text := range left {
		next.files[name] = fakeFile{written: text, synced: text}
	}
	next.durable, next.renamed = maps.Clone(left), false
	return next
}

// TestABrokenFile lets an fsync fail and then the truncation, so FILE keeps a line
// that was rejected. Reads go on. The store tries to heal once a second, and GET /healthz
// tells. If it has not healed by then, a stop removes the line.
func TestABrokenFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failing, attempts, ann := false, 0, somebody(1)
		s := startStore(t, scratch(t), func(op, path string, do func() error) error {
			if op == "create" {
				attempts++
			}
			if failing && op != "write" {
				return errInjected
			}
			return noSync(op, path, do)
		})
		var log bytes.Buffer
		s.logger = slog.New(slog.NewTextHandler(&log, nil))
		mustCommit(t, s, ann.signUp("a@example.org"))
		before := contents(s)
		failing, attempts = true, 0
		wantError(t, "a change", s.commit(ann.logOut("", 1)), errNotSaved)
		for n := range 6 {
			atOnce(3, func(int) { wantError(t, "a change", s.commit(ann.logOut("", 1)), errNotSaved) })
			wantError(t, "checkHealth", s.checkHealth(), errNotSaved)
			compare(t, "a read", contents(s), before)
			synctest.Wait()
			compare(t, "the attempts to heal", attempts, 1+n/2)
			time.Sleep(time.Second / 2)
		}
		compare(t, "the lines in the log", strings.Count(log.String(), "\n"), 1)
		failing = false
		wantError(t, "checkHealth", s.checkHealth(), nil)
		synctest.Wait()
		compare(t, "the lines in the log", strings.Count(log.String(), "\n"), 2)
		survivesAKill(t, "after it has healed", s)
		failing = true
		wantError(t, "a change", s.commit(ann.logOut("", 1)), errNotSaved)
		failing = false
		wantError(t, "a stop", s.close(), nil)
		survivesAKill(t, "after a stop", s)
		compare(t, "after a stop", contents(s), before)
	})
}

// The server as a process:

// TestKillUnderLoad kills the server under the load of 16 clients, over the same file,
// and once more in each start.
func TestKillUnderLoad(t *testing.T) {
	rounds := 3
	if *long {
		rounds = 60
	}
	path, users := newLoadUsers(t)
	for range rounds {
		early := startProcess(t, path)
		time.Sleep(rand.N(60 * time.Millisecond))
		early.kill()
		p := startProcess(t, path, "-quiet")
		p.underLoad(p.client(), users, 100+rand.Int64N(2000), os.Kill)
		checkUsers(t, path, users)
	}
}

// TestTerminateUnderLoad stops the server in the orderly way. If its log has lost its
// reader, requests go on; if the pipe is full, they hang until the stop ends them after
// a while.
func TestTerminateUnderLoad(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("it has no signals")
	}
	for _, log := range []string{"is quiet", "has no reader", "is full"} {
		if log == "is full" && !*long {
			continue // it takes ten seconds
		}
		path, users := newLoadUsers(t)
		p, writes := startProcess(t, path, fmt.Sprint("-quiet=", log == "is quiet")), int64(500)
		c, end := p.client(), os.Signal(syscall.SIGTERM)
		switch log {
		case "has no reader":
			end = os.Interrupt
			p.r.Close()
		case "is full":
			p.w.Write(make([]byte, 65_000)) // of 64 KiB: there is room for three requests
			writes = 2
		}
		p.underLoad(c, users, writes, end)
		compare(t, "its log "+log, p.ProcessState, "exit status 0")
		wantOneDocument(t, "its log "+log, path)
		checkUsers(t, path, users)
	}
}

// TestTerminateAtOnce ends the start with a large FILE, and then, by another signal, a
// stop that waits for a request.
func TestTerminateAtOnce(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("it has no signals")
	}
	path, ann := scratch(t), somebody(1)
	creates := strings.Repeat(",\n"+inJSON(ann.create(ideaID(1), "tea", 5)), 200_000)
	file := `{"format":2,"changes":[` + inJSON(ann.signUp("a@example.org")) + creates + "]}"
	writeFile(t, path, file)
	p := startProcess(t, path)
	for _, err := os.Stat(path + ".lock"); err != nil; _, err = os.Stat(path + ".lock") {
		time.Sleep(time.Millisecond) // it is made before FILE is read
	}
	p.Process.Signal(syscall.SIGTERM)
	p.Wait()
	compare(t, "the end of a start", p.ProcessState, "signal: terminated")
	compare(t, "FILE is as it was", readFile(t, path) == file, true)

	p = startProcess(t, scratch(t))
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.client().url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, "POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n")
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil || !strings.Contains(line, "100 Continue") { // then the handler waits for the body
		t.Fatalf("got %q, %v, want 100 Continue", line, err)
	}
	go func() {
		for p.Process.Signal(syscall.SIGTERM) == nil {
			time.Sleep(10 * time.Millisecond)
		}
	}()
	p.Wait()
	compare(t, "the end of a stop", p.ProcessState, "signal: terminated")
}

// TestAPanicEndsTheProcess makes apply panic, in a process of its own. The process must
// end, as memory may be half changed.
func TestAPanicEndsTheProcess(t *testing.T) {
	if path := os.Getenv("IDEAPOOL_TEST_PANIC"); path != "" {
		defer func() { recover() }() // as net/http would
		s := startStore(t, path, realDisk)
		s.accounts = nil
		s.commit(somebody(1).signUp("a@example.org"))
		return
	}
	path := scratch(t)
	command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.timeout=20s") // if it hangs instead
	command.Env = append(os.Environ(), "IDEAPOOL_TEST_PANIC="+path)
	output, err := command.CombinedOutput()
	if command.ProcessState.ExitCode() != 2 || !strings.Contains(string(output), "assignment to entry in nil map") {
		t.Errorf("got %v, want status 2:\n%s", err, output)
	}
	compare(t, "the next start", reopen(path, readFile(t, path)), after(somebody(1).signUp("a@example.org")))
}

// A process is the server in a process of its own.
type process struct {
	*exec.Cmd
	t    *testing.T
	r, w *os.File // its stderr
}

func startProcess(t *testing.T, path string, flags ...string) *process {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	flags = append(flags, "-addr", "127.0.0.1:0", "-data", path, "-key", rfcKeyFile)
	p := &process{Cmd: exec.Command(os.Args[0], flags...), t: t, r: r, w: w}
	p.Env, p.Stderr = append(os.Environ(), serveEnv+"=1"), w
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	return p
}

func (p *process) kill() {
	p.Process.Kill() // fails if it has exited
	p.Wait()
}

// client waits for the address of the server.
func (p *process) client() *client {
	p.t.Helper()
	for lines := bufio.NewScanner(p.r); lines.Scan(); {
		if url := regexp.MustCompile(`http://127.*`).FindString(lines.Text()); url != "" {
			transport := &http.Transport{MaxIdleConnsPerHost: 16}
			return &client{t: p.t, url: url, transport: transport, origin: "*", names: make(map[string]string)}
		}
	}
	p.t.Fatal("the server prints no address")
	return nil
}

// underLoad has a client for each user at work until, after so many acknowledged writes,
// the server gets a signal.
func (p *process) underLoad(c *client, users []*loadUser, writes int64, end os.Signal) {
	p.t.Helper()
	var acknowledged atomic.Int64
	atOnce(len(users), func(n int) {
		for users[n].change(c) {
			if acknowledged.Add(1) == writes {
				time.AfterFunc(rand.N(3*time.Millisecond), func() { p.Process.Signal(end) })
			}
		}
	})
	if acknowledged.Load() < writes {
		p.t.Fatalf("all clients have stopped after %d writes", acknowledged.Load())
	}
	p.Wait() // how it ended is in its ProcessState
}

// A loadUser has at most one idea.
type loadUser struct {
	id, token string // token is a header
	idea      string // the last response: JSON, or nothing after a delete
	underWay  string // a part of the idea after a change that had no response
}

// newLoadUsers makes 16 users, and a FILE that knows them, so that nobody has to sign up.
func newLoadUsers(t *testing.T) (path string, users []*loadUser) {
	t.Helper()
	s, tokens := startStore(t, scratch(t), noSync), newTokens(rfcKey(t))
	for n := range 16 {
		p := person(s.ids.next())
		mustCommit(t, s, p.signUp(fmt.Sprint(n, "@example.org")))
		token := "X-Access-Token: " + sign(t, tokens, claims{UserID: string(p), Expires: 1e10})
		users = append(users, &loadUser{id: string(p), token: token})
	}
	abandon(s)
	return s.file.path, users
}

// change creates, updates or deletes the idea. It returns false if there is no response.
func (u *loadUser) change(c *client) bool {
	request := "POST /ideas"
	u.underWay = fmt.Sprint("content ", rand.Uint64())
	body := strings.Replace(anIdea, "the-content", u.underWay, 1)
	if u.idea != "" {
		request = "PUT /ideas/" + member(u.idea, "id")
	}
	if u.idea != "" && rand.IntN(2) == 0 {
		request, u.underWay = "DELETE /ideas/"+member(u.idea, "id"), ""
	}
	resp, err := c.try(request, body, u.token)
	if err != nil {
		return false
	}
	u.idea, u.underWay = resp.body, resp.body
	return true
}

// checkUsers compares what there is with the responses. A change without one may have
// happened or not.
func checkUsers(t *testing.T, path string, users []*loadUser) {
	t.Helper()
	s := openTestStore(t, path, realDisk)
	defer abandon(s)
	for _, u := range users {
		list, _ := s.pageOfIdeas(u.id, 1)
		got := strings.Trim(string(list), "[]")
		happened := strings.Contains(got, u.underWay) && (got == "") == (u.underWay == "")
		if got != u.idea && !happened {
			t.Errorf("got the ideas %s, want %s, or with %s", got, u.idea, u.underWay)
		}
		u.idea, u.underWay = got, got
	}
}
