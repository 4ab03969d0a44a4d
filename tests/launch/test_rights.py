"""Rights are looked at before anything is created: the caller's, and those of the slice."""

import pytest
from fake_project import CALLER, DEFAULT_ACCOUNT, Refused
from submitting import BUCKET, FLAGS, SUBMIT, TRAIN, Slices, check_refusal, run, with_flags

from launch.cloud.findings import State
from launch.cloud.rest import Rest
from launch.cloud.rights import OF_SLICES, Rights

OURS = "job@my-project.iam.gserviceaccount.com"
ACCOUNT = f"--service_account={OURS}"
IN_PROJECT = "gcloud projects add-iam-policy-binding my-project --member="
IN_BUCKET = f"gcloud storage buckets add-iam-policy-binding gs://{BUCKET} --member="


@pytest.fixture
def own(project):
    """The project has an account of the user's for the slices, which may do everything."""
    project.accounts[OURS] = False
    return project


def look(account=None):
    """The findings on an account, by what they are about."""
    rights = Rights(Rest(), "my-project", BUCKET, OF_SLICES)
    return {item.subject: item for item in rights.check_account(account)}


def refuse(project, part, status=403, message="denied", reason=""):
    """Requests whose method, host and path have `part` are refused."""
    project.plan = lambda request: Refused(status, message, reason) if part in request else None


def check_nothing_was_made(tpu, cloud, capsys, *expected):
    error = capsys.readouterr().err.strip()
    assert error.startswith("multihot submit tpu: error: ") and "\n" not in error
    for text in expected:
        assert text in error
    assert tpu.created == [] and cloud.buckets[BUCKET] == {}


@pytest.mark.parametrize(
    ("who", "lacking", "expected"),
    [
        (
            CALLER,
            {"tpu.nodes.delete", "tpu.nodes.create"},
            f"{CALLER} lacks tpu.nodes.create, tpu.nodes.delete in project my-project; grant it: "
            f"{IN_PROJECT}user:{CALLER} --role=roles/tpu.admin",
        ),
        (
            CALLER,
            {"storage.objects.create"},
            f"{CALLER} lacks storage.objects.create in gs://{BUCKET}; grant it: {IN_BUCKET}"
            f"user:{CALLER} --role=roles/storage.objectAdmin",
        ),
        (
            CALLER,
            {"iam.serviceAccounts.actAs"},
            f"{CALLER} lacks iam.serviceAccounts.actAs for {DEFAULT_ACCOUNT}; grant it: gcloud iam "
            f"service-accounts add-iam-policy-binding {DEFAULT_ACCOUNT} --project=my-project "
            f"--member=user:{CALLER} --role=roles/iam.serviceAccountUser",
        ),
        (
            DEFAULT_ACCOUNT,
            {"tpu.nodes.delete"},
            f"{DEFAULT_ACCOUNT} lacks tpu.nodes.delete in project my-project; grant it: "
            f"{IN_PROJECT}serviceAccount:{DEFAULT_ACCOUNT} --role=roles/tpu.admin",
        ),
        (
            DEFAULT_ACCOUNT,
            {"storage.objects.get", "storage.objects.list"},
            f"{DEFAULT_ACCOUNT} lacks storage.objects.get, storage.objects.list in gs://{BUCKET}; "
            f"grant it: {IN_BUCKET}serviceAccount:{DEFAULT_ACCOUNT} "
            "--role=roles/storage.objectAdmin",
        ),
    ],
)
def test_a_missing_right_ends_the_command_before_anything_is_made(
    tpu, cloud, project, capsys, who, lacking, expected
):
    project.lacking[who] = lacking
    assert run(SUBMIT) == 2
    check_nothing_was_made(tpu, cloud, capsys, "first: nothing was created. ", expected)


def test_several_missing_rights_are_one_line(tpu, cloud, own, capsys):
    own.lacking = {OURS: {"tpu.nodes.delete", "storage.objects.create"}}
    assert run(with_flags(ACCOUNT)) == 2
    check_nothing_was_made(
        tpu,
        cloud,
        capsys,
        f"{OURS} lacks tpu.nodes.delete in project my-project",
        f"; {OURS} lacks storage.objects.create in gs://{BUCKET}",
    )


def test_an_account_that_is_not_there_or_disabled(tpu, cloud, project, capsys):
    assert run(with_flags(ACCOUNT)) == 2
    check_nothing_was_made(
        tpu, cloud, capsys, "gcloud iam service-accounts create job --project=my-project"
    )
    project.accounts[DEFAULT_ACCOUNT] = True
    assert run(SUBMIT) == 2
    check_nothing_was_made(tpu, cloud, capsys, f"{DEFAULT_ACCOUNT} is disabled; enable it: ")
    del project.accounts[DEFAULT_ACCOUNT]
    assert run(SUBMIT) == 2
    check_nothing_was_made(
        tpu, cloud, capsys, "gcloud services enable compute.googleapis.com --project=my-project"
    )


def test_all_rights_are_said_nothing_of(tpu, cloud, capsys):
    Slices(tpu, cloud, 0)
    assert run(SUBMIT) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_dry_run_asks_nobody(project, capsys):
    assert run(["submit", "tpu", *FLAGS, "--dry_run", "--", *TRAIN]) == 0
    assert project.requests == []


def test_rights_that_cannot_be_looked_at_are_a_warning(tpu, cloud, project, capsys):
    """The client waits, and deletes a slice that says nothing."""
    project.tokens = False
    refuse(project, "cloudresourcemanager", reason="SERVICE_DISABLED", message="is disabled")
    Slices(tpu, cloud, 0)
    assert run(SUBMIT) == 0
    error = capsys.readouterr().err
    assert (
        "warning: not all rights could be checked: cloudresourcemanager.googleapis.com is not "
        "enabled in project my-project; enable it: gcloud services enable "
        "cloudresourcemanager.googleapis.com --project=my-project" in error
    )
    assert "name one by --service_account=ACCOUNT" in error


def test_without_waiting_the_rights_have_to_be_known_or_an_account_named(tpu, cloud, own, capsys):
    own.tokens = False
    refuse(own, "getIamPolicy", message="Permission denied")
    assert run(with_flags("--no_wait")) == 2
    check_nothing_was_made(
        tpu, cloud, capsys, "--no_wait: nothing was created", "--service_account=ACCOUNT, or wait"
    )
    assert run(with_flags("--no_wait", ACCOUNT)) == 0
    assert len(tpu.created) == 1
    assert "warning: not all rights could be checked" in capsys.readouterr().err


def test_without_waiting_a_named_account_without_rights_is_refused_too(tpu, cloud, own, capsys):
    own.lacking[OURS] = {"tpu.nodes.delete"}
    assert run(with_flags("--no_wait", ACCOUNT)) == 2
    check_nothing_was_made(tpu, cloud, capsys, f"{OURS} lacks tpu.nodes.delete")


def test_the_look_can_be_left_out(tpu, cloud, own, capsys):
    """As for rights that hold below a folder of the bucket, of which the bucket says nothing."""
    own.lacking[CALLER] = {"storage.objects.create"}
    Slices(tpu, cloud, 0)
    assert run(with_flags("--nocheck_rights")) == 0
    assert own.requests == []
    assert "warning: not all rights could be checked: --nocheck" in capsys.readouterr().err
    made = len(tpu.created)
    assert run(with_flags("--nocheck_rights", "--no_wait")) == 2
    check_refusal(capsys, "--no_wait: nothing was created")
    assert len(tpu.created) == made


def test_a_service_that_is_away_ends_nothing(tpu, cloud, project, capsys, monkeypatch):
    from launch.cloud import rest

    monkeypatch.setattr(rest, "_RETRY_SECONDS", 0.1)
    project.plan = lambda request: Refused(503, "away")
    Slices(tpu, cloud, 0)
    assert run(SUBMIT) == 0
    assert "cloudresourcemanager.googleapis.com did not answer" in capsys.readouterr().err


def test_a_permission_that_the_service_does_not_know_says_nothing(tpu, cloud, project, capsys):
    """It refuses the whole list for one name; the others are still looked at."""
    project.unknown = {"tpu.operations.get"}
    project.lacking[CALLER] = {"tpu.nodes.get"}
    assert run(SUBMIT) == 2
    check_nothing_was_made(tpu, cloud, capsys, f"{CALLER} lacks tpu.nodes.get in project")
    project.lacking.clear()
    Slices(tpu, cloud, 0)
    assert run(SUBMIT) == 0


class TestPolicies:
    """Where the caller may not create tokens of the account, the policies tell."""

    SUBJECTS = (
        "the machines' rights in project my-project",
        f"the machines' rights in gs://{BUCKET}",
    )

    @pytest.fixture(autouse=True)
    def no_tokens(self, own):
        own.tokens = False
        own.lacking[OURS] = {"everything"}  # Not asked for.
        own.policies = {
            "my-project": {"roles/tpu.admin": [f"serviceAccount:{OURS}"]},
            BUCKET: {"roles/storage.objectAdmin": [f"serviceAccount:{OURS}"]},
        }

    def states(self):
        found = look(OURS)
        return [found[subject].state for subject in self.SUBJECTS]

    def test_roles_in_project_and_bucket_are_enough(self):
        assert self.states() == [State.OK, State.OK]

    def test_roles_that_nobody_gave_are_missing(self, own):
        own.policies = {"my-project": {"roles/tpu.admin": ["user:somebody@example.com"]}}
        assert self.states() == [State.MISSING, State.MISSING]

    def test_a_role_in_the_project_holds_for_its_bucket(self, own):
        own.policies[BUCKET] = {}
        own.policies["my-project"]["roles/storage.objectAdmin"] = [f"serviceAccount:{OURS}"]
        refuse(own, "storage.googleapis.com")  # Nor is the bucket's policy needed.
        assert self.states() == [State.OK, State.OK]

    def test_an_editor_of_the_project_has_a_buckets_own_roles(self, own):
        """As the Compute Engine account of older projects is."""
        own.policies = {
            "my-project": {"roles/editor": [f"serviceAccount:{OURS}"]},
            BUCKET: {
                "roles/storage.legacyBucketOwner": ["projectEditor:my-project"],
                "roles/storage.legacyObjectOwner": ["projectEditor:my-project"],
            },
        }
        assert self.states() == [State.OK, State.OK]
        own.policies["my-project"]["roles/editor"] = ["user:somebody@example.com"]
        assert self.states() == [State.MISSING, State.MISSING]

    def test_what_a_group_may_have_is_not_known(self, own):
        own.policies["my-project"] = {"roles/tpu.admin": ["group:machines@example.com"]}
        assert self.states() == [State.UNKNOWN, State.OK]
        (finding,) = [item for item in look(OURS).values() if item.state is State.UNKNOWN]
        assert finding.line == (
            f"{OURS} is not seen to have tpu.nodes.delete, tpu.nodes.get in project my-project; a "
            "group or a condition may grant it, which cannot be seen from here; to be sure, grant "
            f"it: {IN_PROJECT}serviceAccount:{OURS} --role=roles/tpu.admin"
        )

    def test_a_group_of_another_role_is_no_excuse(self, own):
        own.policies["my-project"] = {"roles/iam.serviceAccountUser": ["group:all@example.com"]}
        assert self.states() == [State.MISSING, State.OK]

    def test_a_role_under_a_condition_is_not_known(self, own):
        own.conditions = {"roles/storage.objectAdmin"}
        assert self.states() == [State.OK, State.UNKNOWN]

    def test_an_organisation_may_grant_what_the_project_does_not(self, own):
        own.parent = "4711"
        own.policies = {}
        assert self.states() == [State.UNKNOWN, State.UNKNOWN]

    @pytest.mark.parametrize(
        ("part", "states"),
        [
            ("getIamPolicy", [State.UNKNOWN, State.UNKNOWN]),
            ("storage.googleapis.com", [State.OK, State.UNKNOWN]),
            ("iam.googleapis.com/v1/roles/storage", [State.OK, State.UNKNOWN]),
        ],
    )
    def test_a_policy_or_role_that_may_not_be_read_is_not_known(self, own, part, states):
        refuse(own, part)
        assert self.states() == states


def test_nobody_signed_in_is_said(tpu, cloud, monkeypatch, capsys, tmp_path):
    from launch.cloud import rest

    monkeypatch.delenv(rest.ENDPOINT_VARIABLE)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    for name in ("HOME", "CLOUDSDK_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    assert run(SUBMIT) == 2
    check_refusal(capsys, "no Google credentials were found; sign in: gcloud auth application-")
    assert tpu.created == []
